"""Two kinds of cluster on one host. Where they cannot be had, tests are skipped with the reason; with CI=true that is a failure."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drill.network import PROGRAMS, Network
from tests.cluster.slurm_cluster import SlurmCluster

REPOSITORY = Path(__file__).parents[2]
SLURM_NEEDS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
# 20 rounds in two phases: long enough to be disturbed in the middle, some seconds of work in all
LONG = ("method.sparse.rounds=10", "method.lowrank.rounds=10")


def _missing(programs: tuple[str, ...]) -> str:
    lacking = [program for program in programs if not shutil.which(program)]
    return " ".join(["root"] * (os.geteuid() != 0) + lacking)


def _require(programs: tuple[str, ...]) -> None:
    missing = _missing(programs)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"needs {missing} (`make test-cluster` as root installs the packages)")
    if missing:
        pytest.skip(f"needs {missing} (`make test-cluster` as root installs the packages)")


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    """The environment of a user who has activated the venv."""
    paths = [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep), "/usr/sbin", "/sbin"]
    return os.environ | {"PATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="session")
def slurm(environ: dict[str, str]) -> Iterator[SlurmCluster]:
    """Three SLURM nodes."""
    _require(SLURM_NEEDS)
    cluster = SlurmCluster(Path(f"/tmp/sl-{secrets.token_hex(4)}"), 3, environ)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """Four hosts with links of 100 Mbit/s."""
    _require(PROGRAMS)
    hosts = Network(4)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A user's folder on the shared file system, with what the repository gives them; the tests' jobs run in it."""
    for name in ("launch", "slurm", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]) -> Path:
    """The undisturbed run of ``LONG`` in a world of one: what all others are held against."""
    run = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "slora_dist", "train", str(REPOSITORY / "configs/tiny.yaml"), *LONG, "--out", str(run)]
    subprocess.run(command, check=True, env=environ, timeout=120, stdout=subprocess.DEVNULL)
    return run
