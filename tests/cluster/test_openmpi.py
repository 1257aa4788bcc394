"""A second MPI library: Debian's Open MPI, beside the MPICH that comes with ``slora-dist[mpi]``."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from drill.processes import output
from slora_dist.runfolder import RunFolder
from tests.tiny import TINY, tensors

LIBRARIES = sorted(Path("/usr/lib").glob("*/libmpi.so.40"))
MPIEXEC = Path("/usr/bin/mpiexec.openmpi")


@pytest.mark.cluster
def test_open_mpi_gives_the_bits_of_a_world_of_one(environ: Mapping[str, str], tiny_run: RunFolder, tmp_path: Path) -> None:
    if not (LIBRARIES and MPIEXEC.exists()):
        assert os.environ.get("CI") != "true", "needs openmpi-bin (`make test-cluster` as root installs it)"
        pytest.skip("needs openmpi-bin (`make test-cluster` as root installs it)")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    out = tmp_path / "run"
    command = [MPIEXEC, "--oversubscribe", "-n", "3", sys.executable, "-m", "slora_dist", "train", TINY, "--out", out]
    output(command, timeout=200, env={**environ, **as_root, "MPI4PY_LIBMPI": str(LIBRARIES[0])})
    weights = "adapter_model.safetensors"
    assert tensors(RunFolder(out))[weights] == tensors(tiny_run)[weights]
    assert RunFolder(out).config() == tiny_run.config()
