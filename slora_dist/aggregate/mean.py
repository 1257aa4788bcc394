"""The mean of updates, streaming or with all of them kept.

Legend: N coordinates, n a stretch of them, K clients.
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

    def scatter(self, index_k: Tensor, values_k: Tensor, weight: float) -> None:
        """Add a client's update that is zero but at the positions ``index_k``, each of which comes once."""
        self._sum_N.index_add_(0, index_k, values_k, alpha=weight)

    def result(self) -> Tensor:
        """Return the mean over all clients that were counted; the sum becomes it, so that this is asked for once."""
        return self._sum_N.div_(self._weight)


class Kept:
    """The updates themselves, for rules that need all of them at once; memory O(K N)."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self.weights: list[float] = []
        self.update_KN: list[Tensor] = []

    def count(self, weight: float) -> None:
        """Announce a client of ``weight``, before its first stretch."""
        self.weights.append(weight)
        self.update_KN.append(torch.empty(self._numel))

    def add(self, start: int, values_n: Tensor, weight: float) -> None:
        """Take a stretch of a client's update that begins at coordinate ``start``."""
        self.update_KN[-1][start : start + values_n.numel()] = values_n

    def scatter(self, index_k: Tensor, values_k: Tensor, weight: float) -> None:
        """Take a client's update that is zero but at the positions ``index_k``."""
        self.update_KN[-1].zero_()[index_k] = values_k

    def result(self) -> Tensor:
        """Return the mean, with the bits that ``Mean`` gives."""
        mean = Mean(self._numel)
        for weight, update_N in zip(self.weights, self.update_KN, strict=True):
            mean.count(weight)
            mean.add(0, update_N, weight)
        return mean.result()

    @property
    def shares(self) -> list[float]:
        """The weights as shares of their sum."""
        return [weight / sum(self.weights) for weight in self.weights]
