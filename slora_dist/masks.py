"""Which entries of a tensor a sparse phase trains: a function of (seed, size), which never has to travel, or of scores.

A mask that is drawn comes from an integer hash that is written down here, not from a library's random stream, which no library promises
to keep across versions and devices.
"""

from collections.abc import Sequence
from math import prod, sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pattern = Literal["random", "rows", "columns", "product"]

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 1 << 16  # positions hashed at a time: they stay in the cache


def _splitmix64(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers (the finaliser of SplitMix64, Steele et al. 2014); a bijection, so distinct keys stay distinct."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def kept(numel: int, density: float) -> int:
    """Return how many of ``numel`` entries a mask of ``density`` keeps: exactly round(density x numel)."""
    return round(density * numel)


def grid(shape: Sequence[int], density: float, pattern: Pattern) -> tuple[int, int] | None:
    """Return how many rows and columns of a matrix a structured mask keeps; None where single entries are drawn.

    ``rows`` and ``columns`` keep whole ones, a ``product`` mask every crossing of sqrt(density) of each, in the matrix's own proportion.
    Vectors have no structure to keep: their entries are drawn one by one under every pattern.
    """
    if pattern == "random" or len(shape) != 2:
        return None
    rows, columns = shape
    if pattern == "rows":
        return max(1, round(density * rows)), columns
    if pattern == "columns":
        return rows, max(1, round(density * columns))
    some = max(1, round(sqrt(density) * rows))
    return some, min(columns, max(1, round(density * prod(shape) / some)))


def random_mask(numel: int, count: int, seed: int) -> Tensor:
    """Draw ``count`` of ``numel`` positions without replacement, each set of that size equally likely under the hash.

    Returns int64 flat positions, ascending. Position i has the key hash(seed + i x golden ratio); the ``count`` smallest keys are kept.
    """
    assert 0 <= count <= numel, f"{count} of {numel}"
    if count == numel:
        return torch.arange(numel)
    share = (count + 8 * sqrt(count) + 8) / numel  # keys are uniform: so many will hold the ``count`` smallest
    while True:
        chosen, keys = _below(numel, seed, share)
        if len(chosen) >= count:
            break
        share *= 2
    smallest = np.argpartition(keys, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
    return torch.from_numpy(np.sort(chosen[smallest]))


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the flat positions (int64, ascending) of the ``count`` largest scores; of equal ones the first, whatever finds them."""
    flat = scores.detach().reshape(-1).cpu()
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    least = torch.kthvalue(flat, len(flat) - count + 1).values
    keep = flat > least
    ties = torch.nonzero(flat == least).flatten()
    keep[ties[: count - int(keep.sum())]] = True
    return torch.nonzero(keep).flatten()


def _below(numel: int, seed: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the positions whose key lies in the lowest ``share`` of all keys, and these keys; memory O(share x numel)."""
    bound = np.uint64(min(2**64 - 1, int(share * 2**64)))
    steps = np.arange(min(_BLOCK, numel), dtype=np.uint64) * np.uint64(_GOLDEN)
    chosen, keys = [], []
    for start in range(0, numel, _BLOCK):
        block = _splitmix64(steps[: min(_BLOCK, numel - start)] + np.uint64((start * _GOLDEN + seed) % 2**64))
        near = np.flatnonzero(block <= bound)
        chosen.append(near + start)
        keys.append(block[near])
    return np.concatenate(chosen), np.concatenate(keys)
