"""MPI as a communicator: mpi4py's buffer calls on bytes, never its pickling ones.

Every call is a non-blocking one followed by a sleepy wait: blocking ones burn the cores that train, and MPI itself has no time-out.
MPI moves data only inside its own calls, so sends have a thread that stays there while the rank trains its next client. That thread and the
main one never call MPI at the same time (MPI_THREAD_SERIALIZED): the main one makes messages meanwhile, or waits. Device memory is staged
through the CPU. Where ranks heal every wait also ends when the lifeline says that the group is over.
Legend: B bytes of a message, b bytes of a bucket or less.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from slora_dist.comm import stream, ulfm
from slora_dist.comm.alone import leave
from slora_dist.comm.base import BUCKET, INIT_SECONDS, MAX_MESSAGE, Chunk, check_summable, check_wire, cut, failing, staged
from slora_dist.comm.door import reach_lifeline, serve_lifeline
from slora_dist.comm.generations import Generations
from slora_dist.comm.lifeline import Healing
from slora_dist.comm.root_lifeline import Lifeline
from slora_dist.errors import ConfigError, RunError, TransportError
from slora_dist.log import say
from slora_dist.world import World, check_size

CPU = torch.device("cpu")
LARGEST = 1 << 28  # elements in one call: Open MPI's counts end at 2^31
SHORTEST_NAP, LONGEST_NAP = 1e-4, 1e-3  # seconds
ADDRESS_BYTES = 1024  # in which rank 0 says where its lifeline is


@dataclass(frozen=True)
class _Transfer:
    """A send or a receive under way; ``wait`` returns when it is done."""

    wait: Callable[[], None]


class MpiComm:
    """One rank of MPI_COMM_WORLD. ``timeout`` is seconds of one operation, ``bucket`` a multiple of 64 bytes.

    MPI is finalized by ``close`` and nothing else: a rank that ends otherwise takes the job with it, where waiting in MPI_Finalize would
    hang it. Ranks that heal never do.
    """

    name = "mpi"

    def __init__(self, world: World, timeout: float, bucket: int = BUCKET, max_message: int = MAX_MESSAGE) -> None:
        assert 0 < bucket <= LARGEST and bucket % 64 == 0
        self._mpi = _start()
        self._world = self._ranks = self._mpi.COMM_WORLD
        self._ranks.Set_errhandler(self._mpi.ERRORS_RETURN)
        self.rank: int = self._ranks.Get_rank()
        self.size: int = self._ranks.Get_size()
        self.members: Sequence[int] = range(self.size)
        self.timeout, self.bucket, self.max_message = timeout, bucket, max_message
        check_size(world, self.size)
        self._sender = ThreadPoolExecutor(1, "mpi-sender")
        self.generations: Generations | None = None
        self._neighbours: dict[int, int] = {}  # ranks on this machine, by a descriptor each
        self._places: Mapping[int, int] = {rank: rank for rank in range(self.size)}  # of ranks in ``_ranks``
        self._left = False  # whether this rank has left its group, and is in no other yet
        self._before: list[Any] = []  # groups that this rank has left
        self._posted: dict[int, Any] = {}  # requests under way; each keeps its memory alive

    def watch(self, world: World, healing: Healing, environ: Mapping[str, str]) -> None:
        """Let this rank go on when another dies, where MPI can do so; else say that it cannot. All ranks call it, before all else."""
        if not ulfm.offered(environ):
            if self.rank == 0:
                say(0, "a rank's death will end this run: only Open MPI 5 goes on, started by mpiexec --with-ft ulfm; --resume goes on too")
            return
        pids, own = torch.zeros(self.size, dtype=torch.int64), torch.tensor([os.getpid()])
        self._run("connect", partial(self._world.Iallgather, own.numpy(), pids.numpy()))
        self._neighbours = ulfm.neighbours(pids.tolist(), environ)
        self.generations = Generations(self._open_lifeline(world, healing, environ), self.timeout)
        self.regroup(INIT_SECONDS)

    def regroup(self, seconds: float | None = None) -> None:
        """Leave the group, and form the next one with all ranks that are there then; who trains meanwhile is waited for.

        Raises ``TransportError`` when one of them dies just then (call again), another ``RunError`` when there is no next group for this
        rank.
        """
        assert self.generations
        self._left = True
        self._sender.submit(int).result()  # sends that were under way have been given up
        meeting = self.generations.meet(seconds)
        for rank in set(self._neighbours) - set(meeting.members):
            ulfm.end(self._neighbours.pop(rank))
        self._before.append(self._ranks)
        try:
            self._ranks = self._sender.submit(self._ranks.Shrink).result(INIT_SECONDS)
        except (TimeoutError, self._mpi.Exception) as error:
            cause = error if str(error) else "MPI waits for a rank that stands still"
            raise RunError(f"rank {self.rank}: regroup failed: {cause}") from error
        self._ranks.Set_errhandler(self._mpi.ERRORS_RETURN)
        self.members, self._places, self._left = meeting.members, ulfm.places_in(self._ranks, self._world), False
        if set(self._places) != set(self.members):
            raise TransportError(f"rank {self.rank}: regroup failed: somebody has died meanwhile")
        self.barrier()  # all have made it: until then some still need the group before
        self._forget()

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
        """End all ranks: MPI_Abort. Where ranks heal this one alone: they see it go, and go too if it is rank 0."""
        if self.generations:
            leave(code)
        self._sender.shutdown(wait=False, cancel_futures=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(code)
        leave(code)

    def close(self) -> None:
        """Leave MPI, all ranks together."""
        if self.generations:  # MPI_Finalize could wait for who is gone
            with suppress(RunError):  # all is done: who dies now is not missed
                self.barrier()
            self.generations.lifeline.close()
            return
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
            request = self._ranks.Irecv(chunk_b.numpy(), self._places[peer])
            self._posted[id(request)] = request
        return _Transfer(partial(self._run, "gather", lambda: request, peer))

    def _run(self, op: str, start: Callable[[], Any], peer: int | None = None, turns: int = 1) -> None:
        """Make the request that ``start`` returns and wait for it, asleep most of the time."""
        nap = SHORTEST_NAP
        deadline = time.monotonic() + self.timeout * turns
        with failing(self.rank, op, peer):
            self._check_group()
            request = start()
            self._posted[id(request)] = request
            while not request.Test():
                self._check_group()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"not done after {self.timeout * turns:g} s")
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP)
            del self._posted[id(request)]

    def _check_group(self) -> None:
        if self.generations and (self._left or self.generations.over):
            raise RuntimeError("the group is over")

    def _forget(self) -> None:
        """End what is under way in groups that this rank has left, and let go of its memory: nothing is written there any more."""
        for group in self._before:
            if group is not self._world:  # where the lifeline was told of, and nothing else
                group.Revoke()
        self._before.clear()
        for key, request in list(self._posted.items()):
            with suppress(self._mpi.Exception):  # revoked: it is done
                if not request.Test():
                    continue
            del self._posted[key]

    def _open_lifeline(self, world: World, healing: Healing, environ: Mapping[str, str]) -> Lifeline:
        """Return this rank's end of the lifeline. Where rank 0 serves it is broadcast, which nobody has to trust."""
        address_B = torch.zeros(ADDRESS_BYTES, dtype=torch.uint8)
        host = environ.get("MASTER_ADDR") or ("127.0.0.1" if world.local_size == world.size else self._mpi.Get_processor_name())
        with failing(self.rank, "connect", 0 if self.rank else None):
            if self.rank == 0:
                root = serve_lifeline(host, world, healing)
                address_B[:] = torch.frombuffer(bytearray(json.dumps([host, root.port]).encode().ljust(ADDRESS_BYTES)), dtype=torch.uint8)
                self.broadcast(address_B)
                return root
            self.broadcast(address_B)
            host, port = json.loads(address_B.numpy().tobytes())
            return reach_lifeline(host, str(port), world, healing)


def _start() -> Any:
    """Import, and thereby initialise, MPI; a rank that ``INIT_SECONDS`` later has not met the others is ended by SIGALRM.

    MPI_Init has no time-out, and no thread of Python runs while it waits: only the kernel can end it.
    """
    signal.alarm(int(INIT_SECONDS))
    try:
        import mpi4py

        mpi4py.rc.thread_level = "serialized"
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        assert MPI.Query_thread() >= MPI.THREAD_SERIALIZED
    except (ImportError, RuntimeError) as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError("comm.backend", f"mpi cannot be used ({cause})", "gloo, or pip install 'slora-dist[mpi]' first") from error
    finally:
        signal.alarm(0)
    return MPI
