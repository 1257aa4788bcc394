"""Slower links, wrapped around any communicator: real messages, delivered when links of given rate and latency would have delivered them.

Nothing of a message changes. ``direct``: rank 0 sends every rank a copy of its own and all links work at the same time. ``collective``:
ranks pass copies on along gloo's tree, and a gather is read one message after the other, as on a cluster behind links that are all alike.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Literal, NoReturn

from torch import Tensor

from slora_dist.comm.base import Chunk, Communicator
from slora_dist.links import Link, passed_on, seconds, sent_to_each


class Shaped:
    """A communicator behind emulated links. ``links`` are those of the other ranks, changed at will by the caller, alike on all ranks."""

    def __init__(self, comm: Communicator, routing: Literal["direct", "collective"], server_mbit: float = inf) -> None:
        self.comm, self.direct, self.capacity = comm, routing == "direct", server_mbit
        self.rank, self.size, self.name, self.bucket = comm.rank, comm.size, comm.name, comm.bucket
        self.links: Mapping[int, Link] = {}

    @property
    def members(self) -> Sequence[int]:
        """The ranks that are there, ascending."""
        return self.comm.members

    def broadcast(self, wire_B: Tensor) -> None:
        """Broadcast, and go on when this rank's link would have delivered it."""
        self.comm.broadcast(wire_B)
        if self.links:
            time.sleep(self._arrivals(wire_B.numel())[self.rank])

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Gather; a message leaves when its sender's link would have carried it, and rank 0 reads no faster than its own link."""
        free = 0.0
        for index, offset, chunk_b in self.comm.gather(self._sent(messages), senders, nbytes):
            if senders[index]:
                link = self.links.get(senders[index], Link())
                free = max(free, time.perf_counter()) + seconds(chunk_b.numel(), self.capacity if self.direct else self._rate(link))
                time.sleep(max(0.0, free - time.perf_counter()))
            yield index, offset, chunk_b

    def reduce(self, values: Tensor) -> None:
        """Reduce; ``collective`` takes what a ring of ranks takes, ``direct`` what sending all parts to rank 0 takes."""
        self.comm.reduce(values)
        if self.links:
            nbytes, share = values.numel() * values.element_size(), 2 * (self.size - 1) / self.size
            slowest = min(link.up_mbit for link in self.links.values())
            star = max(seconds(nbytes, slowest), seconds(nbytes * (self.size - 1), self.capacity))
            ring = share * seconds(nbytes, min(self._rate(link) for link in self.links.values()))
            time.sleep(max(link.latency for link in self.links.values()) + (star if self.direct else ring))

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.comm.barrier()

    def abort(self, code: int) -> NoReturn:
        """End all ranks."""
        self.comm.abort(code)

    def close(self) -> None:
        """Leave together."""
        self.comm.close()

    def _rate(self, link: Link) -> float:
        return min(link.up_mbit, self.capacity)

    def _sent(self, messages: Iterable[Tensor]) -> Iterator[Tensor]:
        own = self.links.get(self.rank, Link())
        for message_B in messages:
            if self.rank:
                time.sleep(own.latency + (seconds(message_B.numel(), own.up_mbit) if self.direct else 0.0))
            yield message_B

    def _arrivals(self, nbytes: int) -> dict[int, float]:
        """Return when each rank has a broadcast, in seconds after rank 0 began to send it."""
        if self.direct:
            return {0: 0.0, **dict(zip(self.links, sent_to_each(list(self.links.values()), self.capacity, nbytes), strict=True))}
        links = [self.links.get(rank, Link()) for rank in range(1, self.size)]
        return dict(enumerate(passed_on(links, self.capacity, nbytes)))
