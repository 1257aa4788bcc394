"""Values as fixed-point integers, whose sum does not depend on its order: gather, reduce, any tree and any number of ranks give equal bits.

All clients of a round share one scale, a power of two. It is the smallest for which their sum fits: clients tell the largest magnitude of
their weighted updates, and the sum of these bounds every coordinate of the sum; each client's rounding adds at most a half.

Legend: N coordinates, n a stretch of them, B bytes.
"""

from collections.abc import Sequence
from math import frexp

import torch
from torch import Tensor

from slora_dist.config import SumBits
from slora_dist.support import Support

INTEGERS: dict[SumBits, torch.dtype] = {32: torch.int32, 64: torch.int64}
SCALE_BYTES = 8  # of a client's magnitude, and of the scale
_LEAST = -1000  # exponent of a scale that float64 still divides by


class Fixed:
    """The codec of a support's coordinates as integers of ``bits`` bits: every message has the same number of bytes."""

    varies = None

    def __init__(self, support: Support, bits: SumBits) -> None:
        self.support, self.bits, self.dtype = support, bits, INTEGERS[bits]
        self.nbytes = bits // 8 * support.numel

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of one message by kind: value, factor_a, factor_b, head."""
        return {kind: self.bits // 8 * count for kind, count in self.support.counts().items()}

    def integers(self, update_N: Tensor, weight: float, exponent: int) -> Tensor:
        """Return the weighted update in units of 2^exponent, rounded to the nearest even integer."""
        return torch.round(_weighted(update_N, weight) * 2.0**-exponent).to(self.dtype)

    def chunk(self, offset: int, chunk_b: Tensor) -> tuple[slice, Tensor]:
        """Return the stretch of a message that starts at byte ``offset``, as its place among the coordinates and its integers."""
        size = self.bits // 8
        aligned_b = chunk_b if chunk_b.storage_offset() % size == 0 else chunk_b.clone()
        return slice(offset // size, (offset + chunk_b.numel()) // size), aligned_b.view(self.dtype)


def magnitude(update_N: Tensor, weight: float) -> float:
    """Return the largest magnitude of a weighted update; NaN or infinity where it has such a value."""
    return float(_weighted(update_N, weight).abs().max())


def exponent(magnitudes: Sequence[float], bits: SumBits) -> int:
    """Return the exponent of the smallest scale for which the sum of updates with these finite magnitudes fits into ``bits`` bits."""
    most = 2 ** (bits - 1) - 1 - len(magnitudes)
    return max(_LEAST, frexp(sum(magnitudes) / most)[1])


def mean(sum_N: Tensor, weight: float, scale: int) -> Tensor:
    """Return the float32 mean that an integer sum stands for: ``sum_N`` in units of 2^scale, over clients of ``weight`` in all."""
    return (sum_N.double() * (2.0**scale / weight)).float()


def _weighted(update_N: Tensor, weight: float) -> Tensor:
    return update_N.detach().cpu().double() * weight
