"""The mean of updates, streaming or with all of them kept. An update with an entry that is not finite is left out of either.

Legend: N coordinates, n a stretch of them, k positions, K clients.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def finite(values: Tensor) -> bool:
    """Whether every entry is a finite number. A sum, which is what passes first, is many times faster than looking at each."""
    return math.isfinite(values.sum().item()) or bool(values.isfinite().all())


class Mean:
    """The weighted mean of updates that arrive stretch by stretch; memory O(N), whatever the number of clients.

    An update of several stretches is added into a second vector, which takes the place of the sum when all of them were sound: so the sum
    never has a part of an update. ``refused`` are the numbers of those that were not, from 0 in the order of ``count``.
    """

    def __init__(self, numel: int) -> None:
        self._sum_N, self._next_N = torch.zeros(numel), torch.empty(0)
        self._weight = 0.0
        self._at, self._pending, self._sound = -1, 0.0, True
        self.refused: list[int] = []

    def count(self, weight: float) -> None:
        """Announce a client of ``weight``, before its first stretch; stretches then come in order and are all of the update."""
        self._close()
        self._at, self._pending = self._at + 1, weight
        self._sound = weight > 0

    def add(self, start: int, values_n: Tensor, weight: float) -> None:
        """Add a stretch of a client's update that begins at coordinate ``start``."""
        self._sound = self._sound and finite(values_n)
        if not self._sound:
            return
        if values_n.numel() == self._sum_N.numel():
            self._sum_N.add_(values_n, alpha=weight)
            self._take()
            return
        if not self._next_N.numel():
            self._next_N = torch.empty_like(self._sum_N)
        span = slice(start, start + values_n.numel())
        torch.add(self._sum_N[span], values_n, alpha=weight, out=self._next_N[span])

    def scatter(self, index_k: Tensor, values_k: Tensor, weight: float) -> None:
        """Add a client's update that is zero but at the positions ``index_k``, each of which comes once."""
        self._sound = self._sound and finite(values_k)
        if self._sound:
            self._sum_N.index_add_(0, index_k, values_k, alpha=weight)
            self._take()

    @property
    def weight(self) -> float:
        """The weight of all sound updates."""
        self._close()
        return self._weight

    def result(self) -> Tensor:
        """Return the mean over all sound updates; the sum becomes it, so that this is asked for once. NaN where there is none."""
        self._close()
        return self._sum_N.div_(self._weight)

    def _close(self) -> None:
        """Take over the last update, if it was sound."""
        if self._at >= 0 and not self._sound:
            self.refused.append(self._at)
            self._pending = 0.0
        elif self._pending:
            self._sum_N, self._next_N = self._next_N, self._sum_N
            self._take()
        self._sound = True

    def _take(self) -> None:
        self._weight, self._pending = self._weight + self._pending, 0.0


class Kept:
    """The updates themselves, for rules that need all of them at once; memory O(K N). ``refused`` is as in ``Mean``."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._weight_K: list[float] = []
        self._update_KN: list[Tensor] = []
        self._sound_K: list[bool] = []

    def count(self, weight: float) -> None:
        """Announce a client of ``weight``, before its first stretch."""
        self._weight_K.append(weight)
        self._update_KN.append(torch.zeros(self._numel))
        self._sound_K.append(weight > 0)

    def add(self, start: int, values_n: Tensor, weight: float) -> None:
        """Take a stretch of a client's update that begins at coordinate ``start``."""
        self._look(values_n)
        self._update_KN[-1][start : start + values_n.numel()] = values_n

    def scatter(self, index_k: Tensor, values_k: Tensor, weight: float) -> None:
        """Take a client's update that is zero but at the positions ``index_k``."""
        self._look(values_k)
        self._update_KN[-1][index_k] = values_k

    def _look(self, values_n: Tensor) -> None:
        """Note whether the last client's update is sound so far, while its values are at hand."""
        self._sound_K[-1] = self._sound_K[-1] and finite(values_n)

    def items(self) -> Iterator[tuple[float, Tensor]]:
        """Yield weight and update of every client in the order of ``count``, sound or not."""
        yield from zip(self._weight_K, self._update_KN, strict=True)

    @property
    def refused(self) -> list[int]:
        """The numbers of updates that are not sound, from 0 in the order of ``count``."""
        return [at for at, sound in enumerate(self._sound_K) if not sound]

    def sound(self) -> tuple[list[float], list[Tensor]]:
        """Return weights and updates of the clients that are not refused."""
        chosen = [at for at, sound in enumerate(self._sound_K) if sound]
        return [self._weight_K[at] for at in chosen], [self._update_KN[at] for at in chosen]

    @property
    def weight(self) -> float:
        """The weight of all sound updates."""
        return sum(self.sound()[0])

    def result(self) -> Tensor:
        """Return the mean over all sound updates, with the bits that ``Mean`` gives."""
        return mean(*self.sound(), self._numel)


def mean(weight_K: list[float], update_KN: list[Tensor], numel: int) -> Tensor:
    """Return the weighted mean of sound updates, with the bits that ``Mean`` gives."""
    total = Mean(numel)
    for weight, update_N in zip(weight_K, update_KN, strict=True):
        total.count(weight)
        total.add(0, update_N, weight)
    return total.result()
