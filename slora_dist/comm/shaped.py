"""Slower links, wrapped around any communicator: real messages, delivered when links of given rate and latency would have delivered them.

Nothing of a message changes. When it is delivered is for a ``Routing`` to say, which knows how long links, kernels and readers take. The
clock is that of the last broadcast: every rank counts the seconds since it had it, and before a message rank 0 is told when it could leave.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from slora_dist.comm.base import Chunk, Communicator
from slora_dist.links import Direct, Link, Passed, Routing, seconds

STAMP_BYTES = 16  # when a message could leave, float64 seconds, and its bytes


class Shaped:
    """A communicator behind emulated links. ``links`` are those of the other ranks, changed at will by the caller, alike on all ranks."""

    def __init__(self, comm: Communicator, routing: Routing) -> None:
        self.comm, self.routing = comm, routing
        self.rank, self.size, self.name, self.bucket = comm.rank, comm.size, comm.name, comm.bucket
        self.links: Mapping[int, Link] = {}
        self._origin = time.perf_counter()
        self._passed = Passed(0.0, 0.0, 0.0)

    @property
    def members(self) -> Sequence[int]:
        """The ranks that are there, ascending."""
        return self.comm.members

    def broadcast(self, wire_B: Tensor) -> None:
        """Broadcast, and go on when this rank's part of it would have been done."""
        self.comm.broadcast(wire_B)
        self._origin = time.perf_counter()
        if self.links:
            self._passed = self.routing.down([self._link(rank) for rank in range(1, self.size)], wire_B.numel())[self.rank]
            self._sleep_until(self._passed.through)

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Gather; rank 0 has the end of each message when the links would have carried it."""
        if not self.links:
            yield from self.comm.gather(messages, senders, nbytes)
            return
        own = list(messages)
        due, sizes = self._due([message_B.numel() for message_B in own], senders)
        for index, offset, chunk_b in self.comm.gather(own, senders, nbytes):
            if offset + chunk_b.numel() == sizes[index]:
                self._sleep_until(due[index])
            yield index, offset, chunk_b

    def reduce(self, values: Tensor) -> None:
        """Reduce; ranks take what a ring takes, clients of a server what sending all parts to it takes."""
        self.comm.reduce(values)
        if self.links:
            nbytes, share, links = values.numel() * values.element_size(), 2 * (self.size - 1) / self.size, self.links.values()
            slowest, capacity = min(link.up_mbit for link in links), self.routing.capacity
            star = max(seconds(nbytes, slowest), seconds(nbytes * (self.size - 1), capacity))
            ring = share * seconds(nbytes, min(slowest, capacity))
            time.sleep(max(link.latency for link in links) + (star if isinstance(self.routing, Direct) else ring))

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.comm.barrier()

    def abort(self, code: int) -> NoReturn:
        """End all ranks."""
        self.comm.abort(code)

    def close(self) -> None:
        """Leave together."""
        self.comm.close()

    def _link(self, rank: int) -> Link:
        return self.links.get(rank, Link())

    def _sleep_until(self, due: float) -> None:
        time.sleep(max(0.0, self._origin + due - time.perf_counter()))

    def _due(self, own: Sequence[int], senders: Sequence[int]) -> tuple[list[float], list[int]]:
        """Return on rank 0 when each message is due, and its bytes; ``own`` are the bytes of this rank's messages, all made by now."""
        now = time.perf_counter() - self._origin
        ready = max(now, self._passed.free)
        stamps = [torch.tensor([ready, float(nbytes)], dtype=torch.float64).view(torch.uint8) for nbytes in own]
        told = [chunk_b.clone().view(torch.float64).tolist() for _, _, chunk_b in self.comm.gather(stamps, senders, STAMP_BYTES)]
        if self.rank:
            return [], []
        due, sizes = [now] * len(senders), [int(nbytes) for _, nbytes in told]
        away = [index for index, sender in enumerate(senders) if sender]
        links = [self._link(senders[index]) for index in away]
        ends = self.routing.up(links, [told[index][0] for index in away], [sizes[index] for index in away], now)
        for index, end in zip(away, ends, strict=True):
            due[index] = end
        return due, sizes
