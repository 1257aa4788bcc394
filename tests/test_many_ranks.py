"""64 ranks on this machine, forked from one warm parent: 60 MB each, where 64 separate programs would need 25 GB."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slora_dist.ledger import totals
from tests.tiny import ROOT, TINY

RANKS = 64
SECONDS = 300
OVERRIDES = [
    f"clients.count={RANKS - 1}", f"clients.per_round={RANKS - 1}", "clients.epochs=1", "data.partition=iid", "comm.backend=gloo",
    "comm.collective=auto", "method.sparse.rounds=1", "method.lowrank.rounds=1",
]  # fmt: skip

# A process of its own, so that pytest's stays as it is: it imports everything, then forks.
_PARENT = """
import sys
from pathlib import Path
import slora_dist.job, slora_dist.comm.torch_comm
from tests.test_many_ranks import fork_all
sys.exit(fork_all(Path(sys.argv[1])))
"""


def fork_all(out: Path) -> int:
    """Fork all ranks with the variables that torchrun would set, and return the worst exit code."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [_fork(world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, out) for rank in range(RANKS)]
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks)


def _fork(variables: dict[str, str], out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(variables)
        from slora_dist.cli import main

        code = main(["train", str(TINY), *OVERRIDES, "--out", str(out)])
    finally:
        os._exit(code)


@pytest.mark.launcher
def test_64_ranks_finish_a_run(tmp_path: Path) -> None:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, "-c", _PARENT, str(tmp_path / "run")]
    parent = subprocess.run(command, env=os.environ | one_thread, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert parent.returncode == 0, parent.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert summary["world_size"] == RANKS and summary["rounds"] == 2
    assert {line["rank"] for line in lines} == set(range(RANKS))
    assert totals(lines)["up"] == summary["payload_bytes"]["up"] > 0
