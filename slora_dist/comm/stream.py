"""The gather of every transport: a star of point-to-point transfers, in order, one bucket ahead of the consumer.

A transfer needs no tag: all transports deliver the transfers of a pair of ranks in the order in which they were posted, and nccl knows no
other way.
Legend: b bytes of a bucket or less.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from slora_dist.comm.base import Chunk, check_wire, cut
from slora_dist.errors import RunError

HEADER = 8  # bytes of an announced size, int64


class Transfer(Protocol):
    """A send or a receive that is under way."""

    def wait(self) -> None:
        """Return when it is done, raise ``RunError`` when it has failed or is late."""


class Link(Protocol):
    """What the stream needs of a transport. Transfers progress while the caller computes."""

    rank: int
    bucket: int
    max_message: int

    def send(self, chunk_b: Tensor, turns: int) -> Transfer:
        """Start to send to rank 0. It may take ``turns`` time-outs: as many messages come before it, or are it."""

    def receive(self, chunk_b: Tensor, peer: int) -> Transfer:
        """Start to receive from ``peer`` into the CPU tensor ``chunk_b``, which is filled when the transfer is done."""


@dataclass(frozen=True)
class _Piece:
    """A chunk on its way to the consumer; ``transfer`` is None where it comes from rank 0 itself."""

    message: int
    offset: int
    chunk_b: Tensor
    transfer: Transfer | None

    def arrive(self) -> Chunk:
        if self.transfer:
            self.transfer.wait()
        return self.message, self.offset, self.chunk_b


def gather(link: Link, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
    """Do what ``Communicator.gather`` promises over ``link``."""
    if link.rank != 0:
        _send(link, messages, senders, nbytes)
        return
    ahead: _Piece | None = None
    for piece in _pieces(link, messages, senders, nbytes):  # asking for a piece posts it: so it travels while the one before is consumed
        if ahead:
            yield ahead.arrive()
        ahead = piece
    if ahead:
        yield ahead.arrive()


def _send(link: Link, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> None:
    own = [index for index, sender in enumerate(senders) if sender == link.rank]
    transfers: list[Transfer] = []
    for index, message_b in zip(own, messages, strict=True):
        check_wire(message_b, nbytes)
        header = [] if nbytes is not None else [torch.tensor([message_b.numel()]).view(torch.uint8)]
        parts = [part for _, part in cut(message_b, link.bucket)] if message_b.numel() else []
        transfers += [link.send(part, index + 1) for part in header + parts]
    for transfer in transfers:
        transfer.wait()


def _pieces(link: Link, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[_Piece | None]:
    """Post every piece in order. None comes before a step that may take long, so that what has arrived is handed over first."""
    own = iter(messages)
    largest = link.bucket if nbytes is None else min(link.bucket, nbytes)
    buffers = cycle([torch.empty(largest, dtype=torch.uint8), torch.empty(largest, dtype=torch.uint8)])
    for index, sender in enumerate(senders):
        if sender == 0:
            yield None
            yield from _own(link, index, next(own), nbytes)
        elif nbytes is not None:
            yield from _incoming(link, index, sender, nbytes, buffers)
        else:
            header = torch.empty(HEADER, dtype=torch.uint8)
            announced = link.receive(header, sender)
            yield None
            announced.wait()
            size = _checked(link, int(header.view(torch.int64)), index, sender)
            yield from _incoming(link, index, sender, size, buffers)
    assert next(own, None) is None, "more messages than senders"


def _own(link: Link, index: int, message_b: Tensor, nbytes: int | None) -> Iterator[_Piece]:
    check_wire(message_b, nbytes)
    for offset, part_b in cut(message_b, link.bucket):
        yield _Piece(index, offset, part_b.cpu(), None)


def _incoming(link: Link, index: int, sender: int, size: int, buffers: Iterator[Tensor]) -> Iterator[_Piece]:
    """Post the pieces of a message of ``size`` bytes into one buffer while the consumer has the other."""
    for offset in range(0, max(size, 1), link.bucket):
        chunk_b = next(buffers)[: min(link.bucket, size - offset)]
        yield _Piece(index, offset, chunk_b, link.receive(chunk_b, sender) if size else None)


def _checked(link: Link, size: int, index: int, sender: int) -> int:
    if not 0 <= size <= link.max_message:
        announced = f"message {index} announces {size} bytes, allowed are 0 to {link.max_message}"
        raise RunError(f"rank 0: gather with rank {sender} failed: {announced}")
    return size
