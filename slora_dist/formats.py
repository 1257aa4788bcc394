"""Number formats of values on the wire: what float32 values become as bytes, and what comes back.

Scales are float32 and stand before the values: with float16 scales updates of 1e-6 would vanish. ``float16`` has one for the whole
message, a power of two that brings the largest magnitude to the upper end of the format; ``int8`` has one for each block of 128 values,
``int4`` for each of 32, chosen so that the largest magnitude of a block becomes the largest integer. Zero stays zero in all of them.

Legend: N values, S blocks with a scale, b bytes, n a stretch of N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slora_dist.config import Values
from slora_dist.errors import RunError

_TOP = 15  # float16 ends at 65504: the largest magnitude comes to lie below 2^15
_LEAST = -126  # exponent of the smallest normal float32: a smaller scale would be rounded itself


@dataclass(frozen=True)
class Format:
    """One number format: ``bits`` of a value; ``block`` values share a scale (None: no scales); ``largest`` integer (None: a float)."""

    dtype: torch.dtype
    bits: int
    block: int | None = None
    largest: int | None = None

    def scales(self, numel: int) -> int:
        """Return how many scales stand before ``numel`` values."""
        return -(-numel // self.block) if self.block else 0

    def value_bytes(self, numel: int) -> int:
        """Return the bytes of ``numel`` values; half a byte at their end is filled up."""
        return -(-numel * self.bits // 8)

    def encode(self, values_N: Tensor) -> list[Tensor]:
        """Return the bytes of scales, if the format has any, and of values, of which there is one or more: contiguous uint8."""
        if self.block is None:
            return [values_N.to(self.dtype).contiguous().view(torch.uint8)]
        size = self._size(len(values_N))
        blocks = functional.pad(values_N, (0, -len(values_N) % size)).view(-1, size)
        scales_S = self._scales(blocks.abs().amax(dim=1))
        steps = blocks / torch.where(scales_S > 0, scales_S, 1.0)[:, None]
        if self.largest is not None:  # a scale that is hardly a float itself rounds too
            steps.round_().clamp_(-self.largest, self.largest)
        numbers_N = steps.to(self.dtype).view(-1)[: len(values_N)]
        return [scales_S.view(torch.uint8), _pack(numbers_N) if self.bits == 4 else numbers_N.view(torch.uint8)]

    def decode(self, at: int, values_b: Tensor, scales_S: Tensor, numel: int) -> tuple[int, Tensor]:
        """Decode the stretch that starts at byte ``at`` of the bytes of ``numel`` values: (its first value, float32 values_n).

        The values may share the memory of the bytes. Raises ``RunError`` on what ``encode`` does not make, and where a value is cut.
        """
        start, whole = at * 8 // self.bits, max(1, self.bits // 8)
        if at % whole or values_b.numel() % whole:
            raise RunError("a stretch of a message that cuts a value in two")
        if self.bits == 4:
            numbers_n = _unpack(values_b, numel - start)
        else:
            aligned_b = values_b if values_b.storage_offset() % whole == 0 else values_b.clone()
            numbers_n = aligned_b.view(self.dtype)
        return start, numbers_n.float() if self.block is None else self._scaled(start, numbers_n, scales_S, self._size(numel))

    def _size(self, numel: int) -> int:
        assert self.block
        return min(self.block, max(numel, 1))

    def _scales(self, largest_S: Tensor) -> Tensor:
        if self.largest is not None:
            return largest_S / self.largest
        exponents_S = (torch.frexp(largest_S).exponent - _TOP).clamp_min(_LEAST)
        scales_S = torch.ldexp(torch.ones_like(largest_S), exponents_S)
        return torch.where(largest_S > 0, scales_S, 0.0) + largest_S * 0  # what is not finite shows in its scale

    def _scaled(self, start: int, numbers_n: Tensor, scales_S: Tensor, size: int) -> Tensor:
        """Multiply a stretch by its scales, which are checked, as the numbers are."""
        if not numbers_n.numel():
            return numbers_n.float()
        first, last = start // size, -(-(start + numbers_n.numel()) // size)
        used_S = scales_S[first:last]
        # a least integer is found many times faster than each is compared, and none is too large
        possible = int(numbers_n.min()) >= -self.largest if self.largest else bool(numbers_n.isfinite().all())
        if not possible or not bool((used_S.isfinite() & (used_S >= 0)).all()):
            raise RunError("a message with a scale or a number that no encoder makes")
        used_S = used_S.to(numbers_n.device)
        if len(used_S) > 1:
            used_S = used_S[:, None].expand(-1, size).reshape(-1)[start - first * size :][: numbers_n.numel()]
        return numbers_n.float().mul_(used_S)


FORMATS: dict[Values, Format] = {
    "float32": Format(torch.float32, 32),
    "bfloat16": Format(torch.bfloat16, 16),
    "float16": Format(torch.float16, 16, block=1 << 62),
    "int8": Format(torch.int8, 8, block=128, largest=127),
    "int4": Format(torch.int8, 4, block=32, largest=7),
}


def _pack(numbers_N: Tensor) -> Tensor:
    """Return integers of -7 to 7 as two a byte, the first one in the lower half; an odd one out has a zero beside it."""
    pairs = functional.pad(numbers_N, (0, len(numbers_N) % 2)).view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def _unpack(values_b: Tensor, most: int) -> Tensor:
    """Undo ``_pack`` for the last ``most`` numbers or fewer."""
    numbers_n = torch.stack([values_b & 15, values_b >> 4], dim=1).view(-1)
    if numbers_n[most:].any():
        raise RunError("a message with a number behind the last one")
    return (numbers_n[:most].view(torch.int8) ^ 8) - 8  # the sign is the fourth bit
