"""A world of one: rank 0 plays every part, nothing leaves the process."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import NoReturn

from torch import Tensor

from slora_dist.comm.base import BUCKET, Chunk, check_summable, check_wire, cut


class Alone:
    """The communicator without a transport."""

    rank, size, name = 0, 1, "alone"
    members: Sequence[int] = (0,)

    def __init__(self, bucket: int = BUCKET) -> None:
        assert bucket > 0 and bucket % 64 == 0
        self.timeout = inf
        self.bucket = bucket

    def broadcast(self, wire_B: Tensor) -> None:
        """Change nothing."""
        check_wire(wire_B)

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Yield the own messages from memory, cut as every transport cuts them."""
        assert not any(senders)
        for index, (_, message_b) in enumerate(zip(senders, messages, strict=True)):
            check_wire(message_b, nbytes)
            yield from ((index, offset, part_b.cpu()) for offset, part_b in cut(message_b, self.bucket))

    def reduce(self, values: Tensor) -> None:
        """Change nothing: the sum over one rank."""
        check_summable(values)

    def barrier(self) -> None:
        """Return."""

    def abort(self, code: int) -> NoReturn:
        """End the process."""
        leave(code)

    def close(self) -> None:
        """Return."""


def leave(code: int) -> NoReturn:
    """End this process at once with exit code ``code``: no clean-up that could wait for a peer, but nothing printed is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
