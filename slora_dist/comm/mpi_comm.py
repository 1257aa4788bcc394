"""MPI as a communicator: mpi4py's buffer calls on bytes, never its pickling ones.

Every call is a non-blocking one followed by a sleepy wait: blocking ones burn the cores that train, and MPI itself has no time-out.
MPI moves data only inside its own calls, so sends have a thread that stays there while the rank trains its next client. That thread and the
main one never call MPI at the same time (MPI_THREAD_SERIALIZED): the main one makes messages meanwhile, or waits. Device memory is staged
through the CPU.
Legend: B bytes of a message, b bytes of a bucket or less.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from slora_dist.comm import stream
from slora_dist.comm.alone import leave
from slora_dist.comm.base import BUCKET, MAX_MESSAGE, Chunk, check_summable, check_wire, cut, failing, staged
from slora_dist.errors import ConfigError
from slora_dist.world import World, check_size

CPU = torch.device("cpu")
LARGEST = 1 << 28  # elements in one call: Open MPI's counts end at 2^31
SHORTEST_NAP, LONGEST_NAP = 1e-4, 1e-3  # seconds


@dataclass(frozen=True)
class _Transfer:
    """A send or a receive under way; ``wait`` returns when it is done."""

    wait: Callable[[], None]


class MpiComm:
    """One rank of MPI_COMM_WORLD. ``timeout`` is seconds of one operation, ``bucket`` a multiple of 64 bytes.

    MPI is finalized by ``close`` and nothing else: a rank that ends otherwise takes the job with it, where waiting in MPI_Finalize would
    hang it.
    """

    name = "mpi"

    def __init__(self, world: World, timeout: float, bucket: int = BUCKET, max_message: int = MAX_MESSAGE) -> None:
        assert 0 < bucket <= LARGEST and bucket % 64 == 0
        self._mpi = _start()
        self._ranks = self._mpi.COMM_WORLD
        self._ranks.Set_errhandler(self._mpi.ERRORS_RETURN)
        self.rank: int = self._ranks.Get_rank()
        self.size: int = self._ranks.Get_size()
        self.members: Sequence[int] = range(self.size)
        self.timeout, self.bucket, self.max_message = timeout, bucket, max_message
        check_size(world, self.size)
        self._sender = ThreadPoolExecutor(1, "mpi-sender")

    def broadcast(self, wire_B: Tensor) -> None:
        """Overwrite ``wire_B`` by that of rank 0."""
        check_wire(wire_B)
        with staged(wire_B, CPU) as bytes_B:
            for _, part in cut(bytes_B, LARGEST):
                self._run("broadcast", partial(self._ranks.Ibcast, part.numpy(), 0))

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Bring messages to rank 0 in order, in chunks. A message must not be made with MPI calls."""
        return stream.gather(self, messages, senders, nbytes)

    def reduce(self, values: Tensor) -> None:
        """Sum to rank 0, in place."""
        check_summable(values)
        with staged(values, CPU) as numbers:
            for _, part in cut(numbers.view(-1), LARGEST):
                own, total = (self._mpi.IN_PLACE, part.numpy()) if self.rank == 0 else (part.numpy(), None)
                self._run("reduce", partial(self._ranks.Ireduce, own, total, self._mpi.SUM, 0))

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self._run("barrier", self._ranks.Ibarrier)

    def abort(self, code: int) -> NoReturn:
        """End all ranks: MPI_Abort."""
        self._sender.shutdown(wait=False, cancel_futures=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self._ranks.Abort(code)
        leave(code)

    def close(self) -> None:
        """Leave MPI, all ranks together."""
        self.barrier()
        self._sender.shutdown()
        self._mpi.Finalize()

    def send(self, chunk_b: Tensor, turns: int) -> stream.Transfer:
        """Start to send to rank 0 (see ``stream.Link``)."""
        start = partial(self._ranks.Isend, chunk_b.cpu().numpy(), 0)
        return _Transfer(self._sender.submit(self._run, "gather", start, 0, turns).result)

    def receive(self, chunk_b: Tensor, peer: int) -> stream.Transfer:
        """Start to receive from ``peer`` (see ``stream.Link``)."""
        with failing(self.rank, "gather", peer):
            request = self._ranks.Irecv(chunk_b.numpy(), peer)
        return _Transfer(partial(self._run, "gather", lambda: request, peer))

    def _run(self, op: str, start: Callable[[], Any], peer: int | None = None, turns: int = 1) -> None:
        """Make the request that ``start`` returns and wait for it, asleep most of the time."""
        nap = SHORTEST_NAP
        deadline = time.monotonic() + self.timeout * turns
        with failing(self.rank, op, peer):
            request = start()
            while not request.Test():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"not done after {self.timeout * turns:g} s")
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP)


def _start() -> Any:
    """Import, and thereby initialise, MPI."""
    try:
        import mpi4py

        mpi4py.rc.thread_level = "serialized"
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        assert MPI.Query_thread() >= MPI.THREAD_SERIALIZED
    except (ImportError, RuntimeError) as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError("comm.backend", f"mpi cannot be used ({cause})", "gloo, or pip install 'slora-dist[mpi]' first") from error
    return MPI
