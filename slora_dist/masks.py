"""Which entries of a tensor a sparse phase trains: a function of (seed, size), so that the mask never has to travel.

A mask comes from an integer hash that is written down here, not from a library's random stream, which no library promises to keep
across versions and devices.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _splitmix64(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers (the finaliser of SplitMix64, Steele et al. 2014); a bijection, so distinct keys stay distinct."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def kept(numel: int, density: float) -> int:
    """Return how many of ``numel`` entries a mask of ``density`` keeps: exactly round(density x numel)."""
    return round(density * numel)


def random_mask(numel: int, count: int, seed: int) -> Tensor:
    """Draw ``count`` of ``numel`` positions without replacement, each set of that size equally likely under the hash.

    Returns int64 flat positions, ascending. Position i has the key hash(seed + i x golden ratio); the ``count`` smallest keys are kept.
    """
    assert 0 <= count <= numel, f"{count} of {numel}"
    if count == numel:
        return torch.arange(numel)
    golden = np.uint64(0x9E3779B97F4A7C15)
    keys = _splitmix64(np.arange(numel, dtype=np.uint64) * golden + np.uint64(seed))
    chosen = np.argpartition(keys, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
    return torch.from_numpy(np.sort(chosen).astype(np.int64))
