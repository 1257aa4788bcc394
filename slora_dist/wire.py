"""From numbers to bytes and back. ``encode`` ends in one contiguous uint8 tensor; whoever carries it knows nothing else.

A client's message is a header of 64 bytes and a body of three parts: the positions of the masked entries (none with ``indices:
implicit``), filled up with zeros to a multiple of 4 bytes; the scales of the number format, if it has any; and the values of the whole
support in its order (``formats.py``). Positions are int32 within their tensor, or the gaps (``codec.py``) between the positions in all
masked tensors laid end to end.

Legend: N coordinates, M masked coordinates, S blocks with a scale, B bytes, n a stretch of N, b a stretch of B.
"""

import struct
from dataclasses import dataclass, replace
from itertools import accumulate
from math import isfinite, prod

import torch
from torch import Tensor
from torch.nn import functional
from xxhash import xxh3_64, xxh3_64_intdigest

from slora_dist import codec
from slora_dist.config import CommConfig, Indices, Values
from slora_dist.errors import RunError
from slora_dist.fixed import Fixed
from slora_dist.formats import FORMATS
from slora_dist.support import Support
from slora_dist.topk import TopK

HEADER_BYTES = 64
_HEADER = struct.Struct("<4sHHIIIIddQQ4x")
_CHECKSUM = struct.Struct("<I")
_MAGIC, _VERSION = b"SLRA", 3
REASONS = ("", "failed", "not finite", "late")  # why a client is left out of a round; its message then holds zeros


@dataclass(frozen=True)
class Header:
    """What travels before a client's update: who, when, from how many documents, its mean training loss and its seconds of training.

    A client that is left out says its ``reason`` and has no examples. ``body_bytes`` and ``checksum`` (XXH3-64) are those of the update's
    bytes; the last four bytes of a header are its own checksum.
    """

    client: int
    phase: int
    round: int
    num_examples: int
    loss: float
    seconds: float
    body_bytes: int
    checksum: int = 0
    reason: str = ""

    def pack(self) -> Tensor:
        """Return the header as 64 bytes."""
        assert _HEADER.size + _CHECKSUM.size == HEADER_BYTES
        fields = (self.client, self.phase, self.round, self.num_examples, self.loss, self.seconds, self.body_bytes, self.checksum)
        packed = _HEADER.pack(_MAGIC, _VERSION, REASONS.index(self.reason), *fields)
        return as_bytes(packed + _CHECKSUM.pack(_own(packed)))

    @staticmethod
    def unpack(header_B: Tensor, expected: "Header") -> "Header":
        """Read 64 bytes and hold them against who and what was ``expected`` now; raises ``RunError`` naming the field that differs.

        Of the expected figures only ``num_examples`` counts, which may be a weight: 0 where nobody but the client knows it.
        """
        packed = header_B.cpu().numpy().tobytes()
        magic, version, why, *fields = _HEADER.unpack(packed[: _HEADER.size])
        if magic != _MAGIC or version != _VERSION:
            raise RunError(f"message of client {expected.client}: not a slora_dist message of version {_VERSION}")
        if _CHECKSUM.unpack(packed[_HEADER.size :]) != (_own(packed[: _HEADER.size]),):
            raise RunError(f"message of client {expected.client}: its header was damaged on the way")
        if why >= len(REASONS):
            raise RunError(f"message of client {expected.client}: left out for a reason that is not known")
        header = Header(*[*fields, REASONS[why]])
        for name in ("client", "phase", "round", "body_bytes"):
            if getattr(header, name) != getattr(expected, name):
                raise RunError(f"message of client {expected.client}: {name} {getattr(header, name)}, expected {getattr(expected, name)}")
        if not (isfinite(header.loss) and isfinite(header.seconds) and header.seconds >= 0):
            raise RunError(f"message of client {expected.client}: loss {header.loss}, {header.seconds} seconds of training")
        if header.num_examples < 1 and not header.reason:
            raise RunError(f"message of client {expected.client}: trained on no example")
        if expected.num_examples and header.num_examples != expected.num_examples and not header.reason:
            documents = f"{header.num_examples} examples, it has {expected.num_examples}"
            raise RunError(f"message of client {expected.client}: trained on {documents}")
        if header.num_examples and header.reason:
            raise RunError(f"message of client {expected.client}: left out, and trained on {header.num_examples} examples")
        return header


def _own(packed: bytes) -> int:
    """Return a header's own checksum: the low half of its XXH3-64."""
    return xxh3_64_intdigest(packed) & 0xFFFFFFFF


class Body:
    """The body of a message as it comes in, held to the checksum that its header tells."""

    def __init__(self, header: Header) -> None:
        self._header, self._left, self._checksum = header, header.body_bytes, xxh3_64()

    def take(self, chunk_b: Tensor) -> None:
        """Take the next stretch; with the last one raises ``RunError`` if the body was damaged on the way."""
        self._checksum.update(chunk_b.numpy().data)
        self._left -= chunk_b.numel()
        if self._left <= 0 and self._checksum.intdigest() != self._header.checksum:
            raise RunError(f"message of client {self._header.client}: damaged on the way")


def frame(header: Header, body_B: Tensor) -> Tensor:
    """Return a client's message: its header, with length and checksum of the body, and the body."""
    told = replace(header, body_bytes=body_B.numel(), checksum=xxh3_64_intdigest(body_B.numpy().data))
    return torch.cat([told.pack(), body_B])


class Wire:
    """The codec of one support: every message of the phase has the same number of bytes, known to both ends."""

    def __init__(self, support: Support, values: Values, indices: Indices) -> None:
        self.support, self.format = support, FORMATS[values]
        self._positions_B = _positions(support, indices)
        self._scales_S = torch.zeros(self.format.scales(support.numel))  # of the message that is being decoded
        self.index_bytes, self.scale_bytes = self._positions_B.numel(), 4 * len(self._scales_S)
        self.varies = None  # every message has the same size
        self.nbytes = self.index_bytes + self.scale_bytes + self.format.value_bytes(support.numel)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of one message by kind: index, scale, value, factor_a, factor_b, head. A shared byte is the first kind's."""
        kinds, end, before = {"index": self.index_bytes, "scale": self.scale_bytes}, 0, 0
        for kind, count in self.support.counts().items():
            end += count
            kinds[kind] = self.format.value_bytes(end) - before
            before += kinds[kind]
        return {kind: count for kind, count in kinds.items() if count}

    def encode(self, offset_N: Tensor) -> Tensor:
        """Return the bytes of a vector, contiguous uint8 of length ``nbytes``."""
        assert offset_N.shape == (self.support.numel,)
        offset_N = offset_N.detach()
        parts_B = self.format.encode(offset_N)
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
        return self.format.decode(max(0, offset - before), chunk_b[ahead:], self._scales_S, self.support.numel)

    def _take(self, offset: int, ahead_b: Tensor) -> None:
        """Compare what is left of the positions, and keep the scales that follow."""
        in_index = max(0, min(ahead_b.numel(), self.index_bytes - offset))
        if not torch.equal(ahead_b[:in_index], self._positions_B[offset : offset + in_index]):
            raise RunError("a message whose positions are not those of the mask")
        at = max(0, offset - self.index_bytes)
        self._scales_S.view(torch.uint8)[at : at + ahead_b.numel() - in_index] = ahead_b[in_index:]


@dataclass(frozen=True)
class Wires:
    """The codecs of a phase: of the broadcast, and of what clients send."""

    up: Wire | TopK | Fixed
    down: Wire

    @staticmethod
    def of(support: Support, comm: CommConfig) -> "Wires":
        """Return the codecs that the settings ask for."""
        settings = comm.wire
        down = Wire(support, settings.down, "implicit" if settings.topk else settings.indices)
        if comm.sum == "exact":
            return Wires(Fixed(support, comm.sum_bits), down)
        if settings.topk:
            return Wires(TopK(support, settings.up, settings.indices, settings.topk), down)
        return Wires(down if settings.up == settings.down else Wire(support, settings.up, settings.indices), down)


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
