"""Aggregates that a few hostile clients cannot move far.

Median and trimmed mean by coordinate are of Yin et al. 2018, Krum and Multi-Krum of Blanchard et al. 2017.

All of them need every update at once, O(K N) of memory, and let all clients count alike, whatever their examples.

Legend: N coordinates, n a stretch of them, K clients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slora_dist.aggregate.mean import mean
from slora_dist.config import Aggregate

_STRETCH = 1 << 20  # coordinates that are sorted at a time
FAR = 3.0  # times the median norm, above which an update is named


@dataclass(frozen=True)
class Trusted:
    """What is made of the updates, and why which clients were not believed: {their place among the updates: reason}."""

    mean_N: Tensor
    distrusted: dict[int, str] = field(default_factory=dict)


def aggregate(rule: Aggregate, update_KN: Sequence[Tensor], hostile: int) -> Trusted:
    """Return the aggregate of sound updates by a rule other than the mean, which holds while at most ``hostile`` of them lie."""
    far = _far(update_KN)
    if rule == "median":
        return Trusted(_columns(update_KN, _middle), far)
    if rule == "trimmed_mean":
        cut = min(hostile, (len(update_KN) - 1) // 2)
        return Trusted(_columns(update_KN, lambda sorted_Kn: sorted_Kn[cut : len(sorted_Kn) - cut].mean(0)), far)
    order = krum(update_KN, hostile)
    last = order[len(order) - hostile :] if hostile else []
    chosen = order[:1] if rule == "krum" else sorted(set(order) - set(last)) or order[:1]
    apart = {at: "its distance to the others is among the largest" for at in last if at not in chosen}
    return Trusted(mean([1.0] * len(chosen), [update_KN[at] for at in chosen], update_KN[0].numel()), apart | far)


def krum(update_KN: Sequence[Tensor], hostile: int) -> list[int]:
    """Return the updates' places by Krum's score, best first: the sum of squared distances to the K - f - 2 nearest others."""
    clients = len(update_KN)
    distance_KK = torch.zeros(clients, clients, dtype=torch.float64)
    for at, one_N in enumerate(update_KN):
        for other in range(at):
            distance_KK[at, other] = distance_KK[other, at] = (one_N.double() - update_KN[other].double()).square().sum()
    nearest = max(1, clients - hostile - 2)
    scores = [float(row_K[torch.arange(clients) != at].sort().values[:nearest].sum()) for at, row_K in enumerate(distance_KK)]
    return sorted(range(clients), key=lambda at: (scores[at], at))


def _columns(update_KN: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``reduce`` to the sorted values of every coordinate, a stretch at a time."""
    numel = update_KN[0].numel()
    spans = (slice(start, start + _STRETCH) for start in range(0, numel, _STRETCH))
    return torch.cat([reduce(torch.stack([update_N[span] for update_N in update_KN]).sort(0).values) for span in spans])


def _middle(sorted_Kn: Tensor) -> Tensor:
    """Return the median: of an even number the mean of the two in the middle."""
    count = len(sorted_Kn)
    return sorted_Kn[(count - 1) // 2] / 2 + sorted_Kn[count // 2] / 2


def _far(update_KN: Sequence[Tensor]) -> dict[int, str]:
    norms = torch.stack([torch.linalg.vector_norm(update_N, dtype=torch.float64) for update_N in update_KN])
    usual = float(_middle(norms.sort().values))
    found = {at: float(norm) / usual for at, norm in enumerate(norms) if usual and norm > FAR * usual}
    return {at: f"its norm is {times:.3g} times the median" for at, times in found.items()}
