"""How ranks of MPI go on without those that are gone: User Level Failure Mitigation (ULFM), which Open MPI 5 has.

``Shrink`` makes a communicator of all processes that live. It learns of a death within milliseconds, but of a process that stands still MPI
knows nothing, and would wait for it. So a rank that has been given up is ended for good by its neighbours, the ranks on its machine.
"""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def offered(environ: Mapping[str, str]) -> bool:
    """Whether ``mpiexec --with-ft ulfm`` has started this process: no other launcher lets the rest of a job live."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes")


def places_in(ranks: Any, world: Any) -> dict[int, int]:
    """Return {rank: place} of all in the communicator ``ranks``: their numbers in ``world`` and in it, which others may have left."""
    group = ranks.Get_group()
    return {rank: place for place, rank in enumerate(group.Translate_ranks(range(group.Get_size()), world.Get_group()))}


def neighbours(pids: Sequence[int], environ: Mapping[str, str]) -> dict[int, int]:
    """Return {rank: descriptor} of the processes on this machine among ``pids``, those of all ranks.

    The number of a process means something on its own machine only, and is used anew when it has ended. A descriptor (pidfd) is not; and
    whether it is that of the rank is seen from the variables that the launcher has given it.
    """
    found = {}
    for rank, pid in enumerate(pids):
        with suppress(OSError):  # no such process here, or somebody else's
            descriptor = os.pidfd_open(pid)
            given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if {f"PMIX_NAMESPACE={environ['PMIX_NAMESPACE']}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode()} <= set(given):
                found[rank] = descriptor
            else:
                os.close(descriptor)
    return found


def end(descriptor: int) -> None:
    """Kill the process, if it is still there."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    os.close(descriptor)
