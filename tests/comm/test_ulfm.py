"""Who may be ended by a neighbour, with real processes; ``tests/cluster/test_ulfm.py`` has the real MPI."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from slora_dist.comm import ulfm

JOB = {"PMIX_NAMESPACE": "prterun-host-1@1"}


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Rank 0, another job's rank 1, and rank 2."""
    places = [(JOB["PMIX_NAMESPACE"], 0), ("prterun-host-2@1", 1), (JOB["PMIX_NAMESPACE"], 2)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(["sleep", "600"], env={"PMIX_NAMESPACE": job, "OMPI_COMM_WORLD_RANK": str(rank)}))
            for job, rank in places
        ]
        for process in started:
            stack.callback(process.kill)
        yield started


def test_only_ranks_of_this_job_on_this_machine_are_neighbours(processes: list["subprocess.Popen[bytes]"]) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    pids = [process.pid for process in processes]
    assert ulfm.neighbours([*pids, gone.pid], JOB).keys() == {0, 2}
    assert ulfm.neighbours([pids[2], pids[1], pids[0]], JOB) == {}, "the same number on another machine is another process"


def test_a_neighbour_is_ended_though_it_stands_still(processes: list["subprocess.Popen[bytes]"]) -> None:
    found = ulfm.neighbours([process.pid for process in processes], JOB)
    os.kill(processes[2].pid, 19)
    ulfm.end(found[2])
    assert processes[2].wait(60) == -9 and processes[0].poll() is None
    ulfm.end(os.dup(found[0]))
    processes[0].wait(60)
    ulfm.end(found[0])  # it is gone already


def test_only_a_launcher_that_lets_the_others_live_offers_it() -> None:
    assert not ulfm.offered({}) and not ulfm.offered({"OMPI_MCA_mpi_ft_enable": "0"})
    assert ulfm.offered({"OMPI_MCA_mpi_ft_enable": "1"})
