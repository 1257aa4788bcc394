"""The factors of one matrix in the vector of a phase, and what becomes of those of several clients.

Legend: N coordinates, K clients, O/I out/in features, R rank, Q columns of stacked factors. peft adds ``scale * B A`` to the weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slora_dist.seeding import derive


@dataclass(frozen=True)
class Pair:
    """Where the factors of ``layer`` lie: A as R x I and B as O x R, each one stretch of the vector."""

    layer: str
    a: slice
    b: slice
    rank: int
    scale: float

    @property
    def out_features(self) -> int:
        """O of the matrix."""
        return int(self.b.stop - self.b.start) // self.rank

    @property
    def in_features(self) -> int:
        """I of the matrix."""
        return int(self.a.stop - self.a.start) // self.rank

    def split(self, vector_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return (b_OR, a_RI), views of a vector."""
        return vector_N[self.b].view(-1, self.rank), vector_N[self.a].view(self.rank, -1)

    def put(self, vector_N: Tensor, b_OR: Tensor, a_RI: Tensor) -> None:
        """Write both factors into a vector."""
        vector_N[self.b], vector_N[self.a] = b_OR.reshape(-1), a_RI.reshape(-1)


def random_factors(out_features: int, in_features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return LoRA's own start (b_OR, a_RI): A uniform in +-1/sqrt(I) (Kaiming with a = sqrt(5)), B zero."""
    bound = 1 / math.sqrt(in_features)
    a_RI = torch.empty(rank, in_features).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(out_features, rank), a_RI


def restart(pairs: Sequence[Pair], vector_N: Tensor, seed: int, number: int) -> None:
    """Write LoRA's own start over the factors in a vector: another one after every round ``number``, the same on every rank."""
    for pair in pairs:
        drawn = derive(seed, "lora_A", pair.layer, number)
        pair.put(vector_N, *random_factors(pair.out_features, pair.in_features, pair.rank, drawn))


def stack(pair: Pair, value_KN: Sequence[Tensor], weight_K: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (left_OQ, right_QI) with left right = sum p_k B_k A_k: the factors side by side, the weights with the A (float64)."""
    factors = [pair.split(value_N) for value_N in value_KN]
    left_OQ = torch.cat([b_OR for b_OR, _ in factors], dim=1).double()
    right_QI = torch.cat([weight * a_RI.double() for (_, a_RI), weight in zip(factors, weight_K, strict=True)])
    return left_OQ, right_QI
