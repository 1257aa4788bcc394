"""64 ranks on this machine, over gloo and over MPI, forked from one warm parent."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from slora_dist.ledger import totals
from tests import zygote

RANKS = 64
SECONDS = 240
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SETTINGS = [f"clients.count={RANKS - 1}", f"clients.per_round={RANKS - 1}", "clients.epochs=1", "data.partition=iid", "run.seed=1"]
ROUNDS = ["method.sparse.rounds=1", "method.lowrank.rounds=1"]


def _arguments(out: Path, *more: str) -> list[str]:
    return ["train", str(TINY), *SETTINGS, *ROUNDS, *more, "--out", str(out)]


def _fork(environ: Mapping[str, str], arguments: list[str]) -> int:
    """Fork a rank and return its process id; the child never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environ)
        for target, fd in enumerate(json.loads(environ.get("ZYGOTE_FDS", "[]")), start=1):
            os.dup2(fd, target)
        from slora_dist.cli import main

        code = main(arguments)
    finally:
        os._exit(code)


# A parent of its own, so that the test process stays as it is: imports everything, then forks.
_PARENT = """
import sys
from pathlib import Path
import slora_dist.job, slora_dist.comm.torch_comm, mpi4py
from tests import test_many_ranks
sys.exit(getattr(test_many_ranks, sys.argv[1])(Path(sys.argv[2])))
"""


def _in_parent(how: str, folder: Path) -> None:
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _PARENT, how, str(folder)],
        env=environ, cwd=TINY.parents[1], capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def over_gloo(folder: Path) -> int:
    """Fork all ranks as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        _fork(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, _arguments(folder / "gloo", "comm.backend=gloo"))
        for rank in range(RANKS)
    ]
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)


def over_mpi(folder: Path) -> int:
    """Let mpiexec start stand-ins, and fork a rank for each of them."""
    with tempfile.TemporaryDirectory(prefix="zy-") as short, socket.socket(socket.AF_UNIX) as server:
        address = f"{short}/s"
        server.bind(address)
        server.listen(RANKS)
        mpiexec = [_mpiexec(), "-n", str(RANKS), sys.executable, "-S", "-E", str(Path(zygote.__file__)), address]
        launcher = subprocess.Popen(mpiexec)
        waiting = []
        for _ in range(RANKS):
            link, environ, fds = zygote.accept(server)
            pid = _fork(environ, _arguments(folder / "mpi", "comm.backend=mpi", "comm.collective=auto"))
            for fd in fds:  # mpiexec waits until nobody holds them
                os.close(fd)
            waiting.append(threading.Thread(target=_tell, args=(link, pid)))
        for thread in waiting:  # started only now: a process that forks must not have threads
            thread.start()
        return launcher.wait()


def _tell(link: socket.socket, pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    link.sendall((code if code >= 0 else 1).to_bytes(8, "little"))
    link.close()


def _mpiexec() -> str:
    found = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None and os.environ.get("CI") != "true":
        pytest.skip("mpiexec is not installed: make install")
    assert found
    return found


@pytest.mark.launcher
@pytest.mark.parametrize("transport", ["gloo", "mpi"])
def test_64_ranks_finish_a_run(transport: str, tmp_path: Path) -> None:
    if transport == "mpi":
        _mpiexec()
    _in_parent(f"over_{transport}", tmp_path)
    run = tmp_path / transport
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert summary["world_size"] == RANKS and summary["rounds"] == 2
    assert {line["rank"] for line in lines} == set(range(RANKS))
    assert totals(lines)["up"] == summary["payload_bytes"]["up"] > 0
    assert (run / "adapter" / "adapter_model.safetensors").exists()
