"""What a transport can do. It moves bytes and sums; it never sees a model, a setting or the ledger.

Legend: B bytes of a message that all ranks know the size of, b bytes of a part of one (a bucket or less).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from slora_dist.errors import RunError, TransportError

BUCKET = 4 << 20  # bytes of a chunk: large against latency, small against a model
MAX_MESSAGE = 64 << 30  # bytes that a peer may announce: above it the announcement is taken for damaged
INIT_SECONDS = 120.0  # ranks start minutes apart on a busy machine, whatever an operation's time-out may be
SUMMABLE = (torch.float32, torch.float64, torch.int32, torch.int64)

Chunk = tuple[int, int, Tensor]  # message index, offset of the chunk in its message in bytes, chunk_b


class Communicator(Protocol):
    """The ranks of a run. Rank 0 is the root, always; every operation is called by all ranks in the same order.

    Whatever breaks in the transport, or takes longer than the time-out, ends in ``TransportError`` naming rank, operation and, where known,
    the peer. After it the communicator is of no use any more: call ``regroup`` where it ``heals``, else ``abort``.
    """

    rank: int
    size: int  # ranks with which the run began
    name: str  # alone, gloo, nccl or mpi
    bucket: int  # bytes of a gathered chunk, at most

    @property
    def members(self) -> Sequence[int]:
        """The ranks that are there, ascending: all, unless some have died and the others have formed a new group."""

    def broadcast(self, wire_B: Tensor) -> None:
        """Overwrite ``wire_B`` on every rank by that of rank 0. Flat contiguous uint8 on any device, of the same size on all ranks."""

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Bring messages to rank 0 in order, in chunks.

        ``senders[i]`` is the rank that sends message i, the same sequence on all ranks. ``messages`` are this rank's own ones in that
        order: flat contiguous uint8, unchanged until the iterator is exhausted. They may be produced lazily: a message is on its way while
        the next one is produced. ``nbytes`` is the size of each message where all ranks know it; with None every message announces its own.

        Yields on rank 0 (i, offset, chunk_b): CPU chunks of ``bucket`` bytes or less, strictly in order of i and offset, valid until the
        iterator's next step. An empty message yields one empty chunk. The next chunk is received while one is consumed, memory is
        O(bucket). On other ranks it yields nothing, and must be exhausted all the same.
        """

    def reduce(self, values: Tensor) -> None:
        """Overwrite ``values`` on rank 0 by the elementwise sum over ranks; on other ranks they are undefined afterwards.

        Contiguous float32, float64, int32 or int64 (else ``ValueError``). The order of summation is the transport's own.
        """

    def barrier(self) -> None:
        """Return when all ranks have called it."""

    def abort(self, code: int) -> NoReturn:
        """End this process with exit code ``code`` at once, and all others as far as the transport can."""

    def close(self) -> None:
        """Leave a healthy world, together with all other ranks. After a failure use ``abort``."""


class Transport(Communicator, Protocol):
    """A communicator that wraps no other. ``timeout`` is seconds of one operation, and may be changed between two."""

    timeout: float


@contextmanager
def hurried(comm: Transport, seconds: float) -> Iterator[None]:
    """Let an operation inside take no more than ``seconds``."""
    usual, comm.timeout = comm.timeout, min(seconds, comm.timeout)
    yield
    comm.timeout = usual  # after a failure it is of no use any more


def cut(flat: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (offset, part) of a one-dimensional tensor in parts of at most ``most`` elements; an empty one is one empty part."""
    for offset in range(0, max(flat.numel(), 1), most):
        yield offset, flat[offset : offset + most]


def check_wire(wire_B: Tensor, nbytes: int | None = None) -> None:
    """Assert what every transport relies on: flat, contiguous bytes, ``nbytes`` of them where that is known."""
    assert wire_B.dtype == torch.uint8 and wire_B.dim() == 1 and wire_B.is_contiguous(), (wire_B.dtype, wire_B.shape)
    assert nbytes in (None, wire_B.numel()), f"{wire_B.numel()} bytes, {nbytes} were promised"


def check_summable(values: Tensor) -> None:
    """Refuse number formats that some transport cannot add: Open MPI adds the raw bits of bfloat16 without a word."""
    if values.dtype not in SUMMABLE:
        raise ValueError(f"cannot reduce {values.dtype}: {', '.join(str(dtype) for dtype in SUMMABLE)}")
    assert values.is_contiguous()


@contextmanager
def failing(rank: int, op: str, peer: int | None = None) -> Iterator[None]:
    """Turn any failure of the transport inside into a ``TransportError`` that says who was doing what with whom."""
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        whom = "" if peer is None else f" with rank {peer}"
        cause = str(error).partition("\n")[0].partition(" This is typically")[0]  # gloo goes on with advice
        raise TransportError(f"rank {rank}: {op}{whom} failed: {cause}") from error


@contextmanager
def staged(values: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Lend ``values`` on the transport's ``device``, and write them back from there."""
    copy = values.to(device)
    yield copy
    if copy is not values:
        values.copy_(copy)
