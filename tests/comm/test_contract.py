"""One suite over every communicator: alone, gloo, MPI, and nccl where there is a GPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from slora_dist.comm import torch_comm
from slora_dist.comm.alone import Alone
from slora_dist.comm.base import Communicator
from slora_dist.comm.sealed import OVERHEAD, Sealed
from slora_dist.comm.torch_comm import TorchComm
from tests.comm.scenarios import BROKEN, BUCKET, EXIT_CODE, HEALTHY, MAX_MESSAGE, play, silence
from tests.ranks import end_ranks

LONG, SHORT = 40.0, 3.0  # seconds: of an operation in a world where nothing may be late, and where something is
LIMIT = 60.0  # seconds of a whole world: a hang fails here
SIZES = {"alone": 1, "gloo": 4, "sealed gloo": 3, "mpi": 3, "nccl": 2}
ROOT = Path(__file__).parents[2]

transports = [
    "alone",
    "sealed gloo",
    "gloo",
    pytest.param("mpi", marks=pytest.mark.launcher),
    pytest.param(
        "nccl", marks=[pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < SIZES["nccl"], reason="nccl needs two GPUs")]
    ),
]


class Played:
    """What became of a world: each rank's results (None where it died before) and the exit codes of its processes."""

    def __init__(self, folder: Path, size: int, exitcodes: list[int | None]) -> None:
        self.ranks = [json.loads(path.read_text()) if path.exists() else None for path in (folder / f"rank-{r}.json" for r in range(size))]
        self.exitcodes = exitcodes

    def error(self, rank: int) -> str:
        """The rank's last words."""
        found = self.ranks[rank]
        assert found is not None and "error" in found, found
        return str(found["error"])


def world(transport: str, names: list[str], folder: Path, timeout: float) -> Played:
    """Play scenarios in a new world."""
    folder.mkdir(exist_ok=True)
    if transport == "mpi":
        return Played(folder, SIZES["mpi"], [_mpiexec(names, folder, timeout)])
    ended = end_ranks(SIZES[transport], _rank, transport, names, folder, timeout, seconds=LIMIT)
    assert not any(end.error for end in ended), [end.error for end in ended]
    return Played(folder, SIZES[transport], [end.exitcode for end in ended])


def _rank(rank: int, size: int, transport: str, names: list[str], folder: Path, timeout: float) -> None:
    play(_communicator(rank, size, transport, folder, timeout), names, folder)


def _communicator(rank: int, size: int, transport: str, folder: Path, timeout: float) -> Communicator:
    if transport == "alone":
        return Alone(BUCKET)
    device = torch.device("cuda", rank) if transport == "nccl" else None
    store = FileStore(str(folder / "store"), size)
    if transport == "sealed gloo":
        return Sealed(TorchComm("gloo", rank, size, store, timeout, None, BUCKET + OVERHEAD, MAX_MESSAGE), b"a key that all have")
    return TorchComm(transport, rank, size, store, timeout, device, BUCKET, MAX_MESSAGE)


def _mpiexec(names: list[str], folder: Path, timeout: float) -> int:
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        assert os.environ.get("CI") != "true", "CI must have an MPI: pip install 'slora-dist[mpi]'"
        pytest.skip("no mpiexec: pip install 'slora-dist[mpi]'")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    more_ranks_than_cores = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    line = [mpiexec, "-n", str(SIZES["mpi"]), sys.executable, "-m", "tests.comm.mpi_rank", str(folder), str(timeout), *names]
    with subprocess.Popen(line, cwd=ROOT, env=os.environ | as_root | more_ranks_than_cores, start_new_session=True) as process:
        try:
            return process.wait(LIMIT)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def playable(transport: str) -> list[str]:
    """What a transport offers: sums cannot be sealed."""
    return [name for name in HEALTHY if "sealed" not in transport or not name.startswith("reduce")]


@pytest.fixture(scope="module", params=transports)
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Played]]:
    """One world per transport, which plays all healthy scenarios: starting processes is what takes the time."""
    yield request.param, world(request.param, playable(request.param), tmp_path_factory.mktemp(request.param), LONG)


@pytest.mark.parametrize("name", HEALTHY)
def test_scenario(healthy: tuple[str, Played], name: str) -> None:
    transport, played = healthy
    if name not in playable(transport):
        pytest.skip("sums cannot be sealed")
    for rank, results in enumerate(played.ranks):
        assert results is not None, f"rank {rank} died: exit codes {played.exitcodes}"
        assert name in results, f"rank {rank}: {results.get('error')}"


def test_place_and_clean_end(healthy: tuple[str, Played]) -> None:
    transport, played = healthy
    places = [results and results["knows_its_place"] for results in played.ranks]
    size, name = SIZES[transport], transport.removeprefix("sealed ")
    assert places == [{"rank": rank, "size": size, "name": name} for rank in range(size)]
    assert not any(played.exitcodes)


def test_gloo_names_the_dead_peer_long_before_the_time_out(tmp_path: Path) -> None:
    played = world("gloo", ["peer_killed"], tmp_path, timeout=10 * LIMIT)
    assert "rank 0: gather with rank 3 failed" in played.error(0)
    assert played.exitcodes == [EXIT_CODE, EXIT_CODE, EXIT_CODE, -signal.SIGKILL]


@pytest.mark.launcher
def test_a_dead_peer_ends_the_mpi_job(tmp_path: Path) -> None:
    played = world("mpi", ["peer_killed"], tmp_path, timeout=10 * LIMIT)
    assert played.exitcodes[0] != 0
    assert played.ranks[2] is None


@pytest.mark.parametrize("transport", transports[2:])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("peer_silent", "gather with rank 1 failed"),
        ("peer_silent_in_reduce", "reduce failed"),
        ("peer_silent_in_barrier", "barrier failed"),
    ],
)
def test_a_silent_peer_is_an_error_after_the_time_out(transport: str, name: str, said: str, tmp_path: Path) -> None:
    for pipe in silence(tmp_path, SIZES[transport]):
        os.mkfifo(pipe)
    played = world(transport, [name], tmp_path, SHORT)
    assert f"rank 0: {said}" in played.error(0)
    assert EXIT_CODE in played.exitcodes


@pytest.mark.parametrize("transport", transports[2:])
def test_an_announced_size_is_checked(transport: str, tmp_path: Path) -> None:
    played = world(transport, ["announces_too_much"], tmp_path, LONG)
    assert f"rank 0: gather with rank 1 failed: message 0 announces {MAX_MESSAGE + 1} bytes" in played.error(0)


@pytest.mark.parametrize("transport", transports[2:])
def test_abort_ends_all_ranks_with_its_code(transport: str, tmp_path: Path) -> None:
    played = world(transport, ["aborts"], tmp_path, timeout=10 * LIMIT)
    assert set(played.exitcodes) == {EXIT_CODE}


def test_every_scenario_is_played() -> None:
    used = Path(__file__).read_text()
    assert all(f'"{name}"' in used for name in BROKEN)


def test_roll_call_names_who_is_missing(tmp_path: Path) -> None:
    ended: list[Any] = end_ranks(1, _incomplete, tmp_path, seconds=LIMIT)
    assert "TransportError: rank 0: connect within 0 s with rank 1 failed" in ended[0].error


def _incomplete(rank: int, size: int, folder: Path) -> None:
    setattr(torch_comm, "INIT_SECONDS", 0.1)  # noqa: B010
    TorchComm("gloo", 0, 2, FileStore(str(folder / "store"), 2), LONG)
