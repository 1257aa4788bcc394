"""Rules by which the clients' factors become one in a low-rank phase: what a round trains and what it changes, and rank 0's part.

With weights p_k that sum to 1, plain averaging is inexact: sum p_k B_k A_k is not (sum p_k B_k)(sum p_k A_k). The other rules mend that.

Legend: N coordinates, K clients, O/I out/in features, R rank, Q columns of stacked factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from slora_dist.aggregate.factors import Pair, stack
from slora_dist.config import AnyPhase, LowrankPhase, Rule
from slora_dist.support import KINDS, Kind, leading
from slora_dist.svd import factor_product

Kinds = tuple[Kind, ...]
Fold = tuple[Tensor, Tensor]  # left_OQ and right_QI; their product is added to the frozen weight

EVERY: Kinds = KINDS
A: Kinds = ("factor_a",)
B: Kinds = ("factor_b",)
HEAD: Kinds = ("head",)


@dataclass(frozen=True)
class Clients:
    """What a rule knows of a round: the phase, the offset after the mean, and where it holds them the clients' values and shares.

    Values are zero in the ranks that a client has not: ``portion_K`` tells how far each client's go.
    """

    phase: LowrankPhase
    offset_N: Tensor
    value_KN: Sequence[Tensor]
    share_K: Sequence[float]
    portion_K: Sequence[Fraction]

    def stack(self, pair: Pair) -> Fold:
        """Return the clients' factors of a pair side by side."""
        return stack(pair, self.value_KN, self.share_K)


Combine = Callable[[Pair, Clients], tuple[Tensor, Tensor]]
FoldOf = Callable[[Pair, Clients], Fold]


@dataclass(frozen=True)
class Behaviour:
    """How a rule works.

    ``trains`` tells what clients train and send in the n-th round of the phase, from 0. What is in one of ``groups`` travels down
    together. ``changes_all``: a round's aggregation moves everything, not only what was trained. ``combine`` makes new factors of a pair.
    ``fold`` is what the frozen base takes over after the round: as wide as all clients' factors, and one more with ``mean_too``.
    ``restarts``: every rank then begins anew with a random A and a zero B, which need no message. ``holds``: rank 0 keeps the clients'
    values until all are there.
    """

    trains: Callable[[int], Kinds] = lambda _: EVERY
    groups: tuple[Kinds, ...] = (EVERY,)
    changes_all: bool = False
    holds: bool = False
    combine: Combine | None = None
    fold: FoldOf | None = None
    mean_too: bool = False
    restarts: bool = False


def _svd(pair: Pair, clients: Clients) -> tuple[Tensor, Tensor]:
    """FlexLoRA (Bai et al. 2024): the best factors of sum p_k B_k A_k."""
    return factor_product(*clients.stack(pair), pair.rank, split=clients.phase.split)


def _fedsvd(pair: Pair, clients: Clients) -> tuple[Tensor, Tensor]:
    """FedSVD (Lee et al. 2025): the product stays, A gets orthonormal rows again; clients have trained B alone."""
    return factor_product(*pair.split(clients.offset_N), pair.rank)


def _fair(pair: Pair, clients: Clients) -> tuple[Tensor, Tensor]:
    """LoRA-FAIR (Bian et al. 2025), as a ridge regression: Abar and Bbar + dB.

    dB minimises ||(Bbar + dB) Abar - sum p_k B_k A_k||^2 + l ||dB||^2, where l is ``fair_ridge`` times the mean of Abar's squared
    singular values.
    """
    b_OR, a_RI = (factor.double() for factor in pair.split(clients.offset_N))
    left_OQ, right_QI = clients.stack(pair)
    gram_RR = a_RI @ a_RI.T
    missing_OR = left_OQ @ (right_QI @ a_RI.T) - b_OR @ gram_RR
    ridge_RR = clients.phase.fair_ridge * gram_RR.trace() / pair.rank * torch.eye(pair.rank, dtype=torch.float64)
    correction_RO = torch.linalg.lstsq(gram_RR + ridge_RR, missing_OR.T, driver="gelsd").solution
    return (b_OR + correction_RO.T).float(), a_RI.float()


def _products(pair: Pair, clients: Clients) -> Fold:
    """FLoRA (Wang et al. 2024): scale x sum p_k B_k A_k, all of it; of every client the ranks that it has."""
    left_OQ, right_QI = clients.stack(pair)
    own_Q = torch.cat([torch.arange(pair.rank) < leading(pair.rank, portion) for portion in clients.portion_K])
    return left_OQ[:, own_Q], pair.scale * right_QI[own_Q]


def _residual(pair: Pair, clients: Clients) -> Fold:
    """FedEx-LoRA (Singhal et al. 2025): scale x (sum p_k B_k A_k - Bbar Abar)."""
    left_OQ, right_QI = _products(pair, clients)
    b_OR, a_RI = pair.split(clients.offset_N.double())
    return torch.cat([left_OQ, -b_OR], dim=1), torch.cat([right_QI, pair.scale * a_RI])


BEHAVIOURS: dict[Rule, Behaviour] = {
    "fedavg": Behaviour(),
    "ffa": Behaviour(trains=lambda _: B + HEAD, groups=(A, B + HEAD)),
    "rolora": Behaviour(trains=lambda at: (A if at % 2 else B) + HEAD, groups=(A, B, HEAD)),
    "fedex": Behaviour(changes_all=True, holds=True, fold=_residual, mean_too=True),
    "stack": Behaviour(groups=(A + B, HEAD), changes_all=True, holds=True, fold=_products, restarts=True),
    "svd": Behaviour(changes_all=True, holds=True, combine=_svd),
    "fedsvd": Behaviour(trains=lambda _: B + HEAD, changes_all=True, combine=_fedsvd),
    "fair": Behaviour(changes_all=True, holds=True, combine=_fair),
}


def behaviour(phase: AnyPhase) -> Behaviour:
    """Return how the rule of a phase works; phases without factors have the mean."""
    return BEHAVIOURS[phase.rule if isinstance(phase, LowrankPhase) else "fedavg"]


def combine(pairs: Sequence[Pair], clients: Clients) -> tuple[Tensor, dict[str, Fold]]:
    """Return the offset with every pair of factors as the rule makes it, and what the frozen weight of each layer takes over."""
    rule, result_N, folds = behaviour(clients.phase), clients.offset_N, dict[str, Fold]()
    if rule.combine:
        result_N = result_N.clone()
        for pair in pairs:
            pair.put(result_N, *rule.combine(pair, clients))
    if rule.fold:
        folds = {pair.layer: rule.fold(pair, clients) for pair in pairs}
    return result_N, folds
