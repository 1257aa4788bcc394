"""Random order from raw Philox bits: numpy promises those for ever, its ``permutation`` and ``choice`` it does not.

Legend: N items.
"""

import numpy as np
from numpy.typing import NDArray


def permutation(count: int, seed: int) -> NDArray[np.int64]:
    """Return a random permutation_N of 0..``count``-1, the same bits on every machine for one ``seed`` (from ``derive``)."""
    bits_N = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(bits_N, kind="stable").astype(np.int64)


def subset(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return at most ``limit`` of 0..``count``-1, drawn by ``seed``, in ascending order; all of them without a limit."""
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    return np.sort(permutation(count, seed)[:limit])
