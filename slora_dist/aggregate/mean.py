"""The streaming mean of updates.

Legend: N coordinates, n a stretch of them.
"""

import torch
from torch import Tensor


class Mean:
    """The weighted mean of updates that arrive stretch by stretch; memory O(N), whatever the number of clients."""

    def __init__(self, numel: int) -> None:
        self._sum_N = torch.zeros(numel)
        self._weight = 0.0

    def count(self, weight: float) -> None:
        """Announce a client of ``weight``, before its first stretch."""
        self._weight += weight

    def add(self, start: int, values_n: Tensor, weight: float) -> None:
        """Add a stretch of a client's update that begins at coordinate ``start``."""
        self._sum_N[start : start + values_n.numel()].add_(values_n.to(self._sum_N.device), alpha=weight)

    def result(self) -> Tensor:
        """Return the mean over all clients that were counted; the sum becomes it, so that this is asked for once."""
        return self._sum_N.div_(self._weight)
