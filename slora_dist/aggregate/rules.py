"""Rules by which the clients' factors become one in a low-rank phase: what a round trains and what it changes, and rank 0's part.

With weights p_k that sum to 1, plain averaging is inexact: sum p_k B_k A_k is not (sum p_k B_k)(sum p_k A_k). The other rules mend that.

Legend: N coordinates, K clients, O/I out/in features, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from slora_dist.aggregate.factors import Pair, stack
from slora_dist.config import AnyPhase, LowrankPhase, Rule
from slora_dist.support import KINDS, Kind
from slora_dist.svd import factor_product

Kinds = tuple[Kind, ...]
Combine = Callable[[LowrankPhase, Pair, Tensor, Sequence[Tensor], Sequence[float]], tuple[Tensor, Tensor]]

EVERY: Kinds = KINDS
A: Kinds = ("factor_a",)
B: Kinds = ("factor_b",)
HEAD: Kinds = ("head",)


@dataclass(frozen=True)
class Behaviour:
    """How a rule works.

    ``trains`` tells what clients train and send in the n-th round of the phase, from 0. What is in one of ``groups`` travels down
    together. ``changes`` is what a round's aggregation moves: all of what was trained, or everything. ``combine`` makes new factors of a
    pair out of the offset after the mean and of the clients' own values; those are then kept on rank 0 until all are there.
    """

    trains: Callable[[int], Kinds] = lambda _: EVERY
    groups: tuple[Kinds, ...] = (EVERY,)
    changes_all: bool = False
    holds: bool = False
    combine: Combine | None = None


def _svd(phase: LowrankPhase, pair: Pair, offset_N: Tensor, value_KN: Sequence[Tensor], weight_K: Sequence[float]) -> tuple[Tensor, Tensor]:
    """FlexLoRA (Bai et al. 2024): the best factors of sum p_k B_k A_k."""
    return factor_product(*stack(pair, value_KN, weight_K), pair.rank, split=phase.split)


def _fedsvd(
    phase: LowrankPhase, pair: Pair, offset_N: Tensor, value_KN: Sequence[Tensor], weight_K: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """FedSVD (Lee et al. 2025): the product stays, A gets orthonormal rows again; clients have trained B alone."""
    return factor_product(*pair.split(offset_N), pair.rank)


BEHAVIOURS: dict[Rule, Behaviour] = {
    "fedavg": Behaviour(),
    "ffa": Behaviour(trains=lambda _: B + HEAD, groups=(A, B + HEAD)),
    "rolora": Behaviour(trains=lambda at: (A if at % 2 else B) + HEAD, groups=(A, B, HEAD)),
    "svd": Behaviour(changes_all=True, holds=True, combine=_svd),
    "fedsvd": Behaviour(trains=lambda _: B + HEAD, changes_all=True, combine=_fedsvd),
}


def behaviour(phase: AnyPhase) -> Behaviour:
    """Return how the rule of a phase works; phases without factors have the mean."""
    return BEHAVIOURS[phase.rule if isinstance(phase, LowrankPhase) else "fedavg"]


def combine(phase: LowrankPhase, pairs: Sequence[Pair], offset_N: Tensor, value_KN: Sequence[Tensor], weight_K: Sequence[float]) -> Tensor:
    """Return the offset with every pair of factors as the rule makes it of the offset after the mean and of the clients' values."""
    rule = behaviour(phase).combine
    if rule is None:
        return offset_N
    result_N = offset_N.clone()
    for pair in pairs:
        pair.put(result_N, *rule(phase, pair, offset_N, value_KN, weight_K))
    return result_N
