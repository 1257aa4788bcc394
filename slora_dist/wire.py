"""From numbers to bytes and back. ``encode`` ends in one contiguous uint8 tensor; whoever carries it knows nothing else.

A client's message is a header of 64 bytes and a body. The body is, with ``indices: explicit``, the int32 position of every masked entry
within its tensor, and then the values of the whole support in its order.

Legend: N coordinates, M masked coordinates, B bytes, n a stretch of N, b a stretch of B.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from slora_dist.errors import RunError
from slora_dist.support import Support

HEADER_BYTES = 64
_HEADER = struct.Struct("<4sHHIIIIddQ16x")
_MAGIC, _VERSION = b"SLRA", 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Header:
    """What travels before a client's update: who, when, from how many documents, its mean training loss and its seconds of training."""

    client: int
    phase: int
    round: int
    num_examples: int
    loss: float
    seconds: float
    body_bytes: int

    def pack(self) -> Tensor:
        """Return the header as 64 bytes."""
        assert _HEADER.size == HEADER_BYTES
        fields = (self.client, self.phase, self.round, self.num_examples, self.loss, self.seconds, self.body_bytes)
        return as_bytes(_HEADER.pack(_MAGIC, _VERSION, 0, *fields))

    @staticmethod
    def unpack(header_B: Tensor, expected: "Header") -> "Header":
        """Read 64 bytes and hold them against who and what was ``expected`` now; raises ``RunError`` naming the field that differs."""
        magic, version, _, *fields = _HEADER.unpack(header_B.cpu().numpy().tobytes())
        if magic != _MAGIC or version != _VERSION:
            raise RunError(f"message of client {expected.client}: not a slora_dist message of version {_VERSION}")
        header = Header(*fields)
        for name in ("client", "phase", "round", "body_bytes"):
            if getattr(header, name) != getattr(expected, name):
                raise RunError(f"message of client {expected.client}: {name} {getattr(header, name)}, expected {getattr(expected, name)}")
        if header.num_examples < 1:
            raise RunError(f"message of client {expected.client}: trained on no example")
        return header


class Wire:
    """The codec of one support: every message of the phase has the same number of bytes, known to both ends."""

    def __init__(self, support: Support, values: Literal["float32", "bfloat16"], indices: Literal["implicit", "explicit"]) -> None:
        self.support, self.dtype, self.explicit = support, _DTYPES[values], indices == "explicit"
        masked = sum(slot.count for slot in support.slots if slot.mask_seed is not None)
        self.index_bytes = 4 * masked if self.explicit else 0
        self.nbytes = self.index_bytes + self.dtype.itemsize * support.numel

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of one message by kind: index, value, factor_a, factor_b, head."""
        kinds = {"index": self.index_bytes} if self.index_bytes else {}
        return kinds | {kind: count * self.dtype.itemsize for kind, count in self.support.counts().items()}

    def encode(self, offset_N: Tensor) -> Tensor:
        """Return the bytes of a vector, contiguous uint8 of length ``nbytes``."""
        assert offset_N.shape == (self.support.numel,)
        values_B = offset_N.detach().to(self.dtype).contiguous().view(torch.uint8)
        return torch.cat([self._positions_B.to(values_B.device), values_B]) if self.explicit else values_B

    def decode(self, wire_B: Tensor) -> Tensor:
        """Return the float32 vector of a whole message. Raises ``RunError`` on a wrong length or on positions that are not the mask."""
        if wire_B.numel() != self.nbytes:
            raise RunError(f"a message of {wire_B.numel()} bytes where {self.nbytes} belong")
        return self.decode_chunk(0, wire_B)[1]

    def decode_chunk(self, offset: int, chunk_b: Tensor) -> tuple[int, Tensor]:
        """Decode the stretch of a message that starts at byte ``offset``: (first coordinate, float32 values of the stretch)."""
        in_index = max(0, min(chunk_b.numel(), self.index_bytes - offset))
        if in_index and not torch.equal(chunk_b[:in_index].cpu(), self._positions_B[offset : offset + in_index]):
            raise RunError("a message whose positions are not those of the mask")
        values_b = chunk_b[in_index:]
        if (offset + in_index - self.index_bytes) % self.dtype.itemsize or values_b.numel() % self.dtype.itemsize:
            raise RunError("a stretch of a message that cuts a value in two")
        start = max(0, offset - self.index_bytes) // self.dtype.itemsize
        aligned_b = values_b if values_b.storage_offset() % self.dtype.itemsize == 0 else values_b.clone()
        return start, aligned_b.view(self.dtype).float()

    @cached_property
    def _positions_B(self) -> Tensor:
        positions = [slot.index.int() for slot in self.support.slots if slot.index is not None]
        return torch.cat(positions).view(torch.uint8) if positions else torch.empty(0, dtype=torch.uint8)


def as_bytes(data: bytes) -> Tensor:
    """Return ``data`` as a uint8 tensor of its own memory."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
