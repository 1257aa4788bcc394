"""Ranks on one machine share a clock; another machine's is asked for, to a bound that is told."""

import time
from pathlib import Path

import pytest
from torch._C._distributed_c10d import FileStore

from slora_dist import clock
from slora_dist.comm.alone import Alone
from slora_dist.comm.metered import Metered
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.ledger import Ledger
from tests.ranks import run_ranks

AHEAD = {0: 0.0, 1: 0.0, 2: 777.0}  # rank 2 runs on another machine, which started earlier


class Elsewhere:
    """The time module of a rank's machine."""

    time = staticmethod(time.time)

    def __init__(self, rank: int) -> None:
        self.ahead = AHEAD[rank]

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead


def _rank(rank: int, size: int, folder: Path) -> tuple[dict[int, float], float]:
    clock.time, clock.machine = Elsewhere(rank), lambda: f"machine of {AHEAD[rank]}"  # type: ignore[assignment, attr-defined]
    comm = Metered(TorchComm("gloo", rank, size, FileStore(str(folder / "store"), size), 40.0), Ledger(rank))
    found = clock.synchronize(comm)
    comm.comm.close()
    return found


def test_another_machine_is_asked_for_its_clock(tmp_path: Path) -> None:
    shifts, error = run_ranks(3, _rank, tmp_path)[0]
    assert shifts[1] == shifts[0] and 0 < error < 5
    assert shifts[2] - shifts[0] == pytest.approx(-777.0, abs=error)


def test_alone_there_is_one_clock() -> None:
    shifts, error = clock.synchronize(Metered(Alone(), Ledger(0)))
    assert list(shifts) == [0] and error == 0
    assert shifts[0] + time.perf_counter() == pytest.approx(time.time(), abs=1)
