"""From numbers to bytes and back. ``encode`` ends in one contiguous uint8 tensor; whoever carries it knows nothing else.

A client's message is a header of 64 bytes and a body of three parts: the positions of the masked entries (none with ``indices:
implicit``), filled up with zeros to a multiple of 4 bytes; with ``values: int8`` a float32 scale for each block of 128 coordinates; and the
values of the whole support in its order. Positions are int32 within their tensor, or the gaps (``codec.py``) between the positions in all
masked tensors laid end to end.

Legend: N coordinates, M masked coordinates, S blocks with a scale, B bytes, n a stretch of N, b a stretch of B.
"""

import struct
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from slora_dist import codec
from slora_dist.errors import RunError
from slora_dist.support import Support

HEADER_BYTES = 64
_HEADER = struct.Struct("<4sHHIIIIddQ16x")
_MAGIC, _VERSION = b"SLRA", 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_SCALED = 128  # coordinates that share a scale
_LARGEST = 127  # of an int8 that has an opposite

Values = Literal["float32", "bfloat16", "int8"]
Indices = Literal["implicit", "gap", "gap+zstd", "int32"]


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

    def __init__(self, support: Support, values: Values, indices: Indices) -> None:
        self.support, self.dtype = support, _DTYPES[values]
        self._positions_B = _positions(support, indices)
        scales = -(-support.numel // _SCALED) if values == "int8" else 0
        self._scales_S = torch.zeros(scales)  # of the message that is being decoded
        self.index_bytes, self.scale_bytes = self._positions_B.numel(), 4 * scales
        self.nbytes = self.index_bytes + self.scale_bytes + self.dtype.itemsize * support.numel

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of one message by kind: index, scale, value, factor_a, factor_b, head."""
        kinds = {"index": self.index_bytes, "scale": self.scale_bytes}
        kinds |= {kind: count * self.dtype.itemsize for kind, count in self.support.counts().items()}
        return {kind: count for kind, count in kinds.items() if count}

    def encode(self, offset_N: Tensor) -> Tensor:
        """Return the bytes of a vector, contiguous uint8 of length ``nbytes``."""
        assert offset_N.shape == (self.support.numel,)
        offset_N = offset_N.detach()
        parts = _quantize(offset_N) if self.scale_bytes else (offset_N.to(self.dtype).contiguous(),)
        parts_B = [part.view(torch.uint8) for part in parts]
        if self.index_bytes:
            parts_B.insert(0, self._positions_B.to(offset_N.device))
        return torch.cat(parts_B) if len(parts_B) > 1 else parts_B[0]

    def decode(self, wire_B: Tensor) -> Tensor:
        """Return the float32 vector of a whole message. Raises ``RunError`` on a wrong length and on what ``decode_chunk`` refuses."""
        if wire_B.numel() != self.nbytes:
            raise RunError(f"a message of {wire_B.numel()} bytes where {self.nbytes} belong")
        return self.decode_chunk(0, wire_B)[1]

    def decode_chunk(self, offset: int, chunk_b: Tensor) -> tuple[int, Tensor]:
        """Decode the stretch of a message that starts at byte ``offset``: (first coordinate, float32 values of the stretch).

        Stretches come in order, and all of one message before the next: scales are kept until their values come. The values may share
        the stretch's memory. Raises ``RunError`` on positions that are not the mask's, on scales and integers that ``encode`` does not
        make, and where a stretch ends within a value.
        """
        before = self.index_bytes + self.scale_bytes
        ahead = max(0, min(chunk_b.numel(), before - offset))
        if ahead:
            self._take(offset, chunk_b[:ahead].cpu())
        values_b, at = chunk_b[ahead:], offset + ahead - before
        if at % self.dtype.itemsize or values_b.numel() % self.dtype.itemsize:
            raise RunError("a stretch of a message that cuts a value in two")
        start = max(0, at) // self.dtype.itemsize
        aligned_b = values_b if values_b.storage_offset() % self.dtype.itemsize == 0 else values_b.clone()
        values_n = aligned_b.view(self.dtype)
        return start, self._scale(start, values_n) if self.scale_bytes else values_n.float()

    def _take(self, offset: int, ahead_b: Tensor) -> None:
        """Compare what is left of the positions, and keep the scales that follow."""
        in_index = max(0, min(ahead_b.numel(), self.index_bytes - offset))
        if not torch.equal(ahead_b[:in_index], self._positions_B[offset : offset + in_index]):
            raise RunError("a message whose positions are not those of the mask")
        at = max(0, offset - self.index_bytes)
        self._scales_S.view(torch.uint8)[at : at + ahead_b.numel() - in_index] = ahead_b[in_index:]

    def _scale(self, start: int, values_n: Tensor) -> Tensor:
        first, last = start // _SCALED, -(-(start + values_n.numel()) // _SCALED)
        scales_S = self._scales_S[first:last]
        lowest = int(values_n.min()) if values_n.numel() else 0  # many times faster than comparing each
        if not bool((scales_S.isfinite() & (scales_S >= 0)).all()) or lowest < -_LARGEST:
            raise RunError("a message with a scale or an integer that no encoder makes")
        scales_n = scales_S[:, None].expand(-1, _SCALED).reshape(-1)[start - first * _SCALED :][: values_n.numel()]
        return values_n.float().mul_(scales_n.to(values_n.device))


def _quantize(offset_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scales_S, integers_N) with offset = scale x integer: the largest of a block becomes +-127, zero stays zero."""
    blocks = functional.pad(offset_N, (0, -len(offset_N) % _SCALED)).view(-1, _SCALED)
    scales_S = blocks.abs().amax(dim=1) / _LARGEST
    steps = blocks / torch.where(scales_S > 0, scales_S, 1.0)[:, None]
    integers = steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)  # a scale that is hardly a float itself rounds too
    return scales_S, integers.view(-1)[: len(offset_N)]


def _positions(support: Support, indices: Indices) -> Tensor:
    """Return the bytes of the masked positions, a multiple of 4."""
    masked = [(slot.index, prod(slot.shape)) for slot in support.slots if slot.index is not None] if indices != "implicit" else []
    if not masked:
        return torch.empty(0, dtype=torch.uint8)
    if indices == "int32":
        return torch.cat([index.int() for index, _ in masked]).view(torch.uint8)
    *starts, numel = accumulate((size for _, size in masked), initial=0)
    index_M = torch.cat([index + start for (index, _), start in zip(masked, starts, strict=True)])
    code_B = codec.encode(index_M, numel, compact=indices == "gap+zstd")
    return functional.pad(code_B, (0, -len(code_B) % 4))


def as_bytes(data: bytes) -> Tensor:
    """Return ``data`` as a uint8 tensor of its own memory."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
