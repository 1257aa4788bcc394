"""What each rule makes of the clients' factors, against the dense mean of the clients' products.

Legend: N coordinates, K clients, O/I out/in features, R rank.
"""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slora_dist.aggregate import rules
from slora_dist.aggregate.factors import Pair, restart
from slora_dist.aggregate.mean import Kept
from slora_dist.aggregate.server import Server
from slora_dist.cli import main
from slora_dist.config import LowrankPhase, Rule, ServerConfig
from slora_dist.rounds import training
from slora_dist.support import KINDS, Slot, Support
from tests.tiny import run

SHAPES = {"tall": (13, 7), "wide": (5, 12)}
EXAMPLES = (7.0, 1.0, 2.0, 5.0)
RULES: tuple[Rule, ...] = get_args(Rule)
INEXACT = ("fedavg", "fair")
HEAD = 6


class Round:
    """Factors of two matrices that are not square, scaled by 2.5, and a head, after one round of four clients of different weights."""

    def __init__(self, rule: Rule, rank: int | None, at: int = 0, fair_ridge: float = 0.01, client_ranks: tuple[int, ...] = ()) -> None:
        self.phase = LowrankPhase(rule=rule, fair_ridge=fair_ridge, client_ranks=list(client_ranks))
        slots = [Slot.whole("head", (HEAD,), "head")]
        ranks = {layer: rank or min(shape) for layer, shape in SHAPES.items()}
        for layer, (out, into) in SHAPES.items():
            slots += [Slot.whole(f"{layer}.a", (ranks[layer], into), "factor_a")]
            slots += [Slot.whole(f"{layer}.b", (out, ranks[layer]), "factor_b")]
        self.support = Support(slots)
        spans = {slot.name: span for slot, span in self.support.spans()}
        self.head = spans["head"]
        self.pairs = [Pair(layer, spans[f"{layer}.a"], spans[f"{layer}.b"], ranks[layer], 2.5) for layer in SHAPES]
        self.part = self.support.part(rules.behaviour(self.phase).trains(at))
        draw = torch.Generator().manual_seed(3)
        self.start_N = torch.randn(self.support.numel, generator=draw)
        self.update_Kn = [torch.randn(self.part.support.numel, generator=draw) for _ in EXAMPLES]
        self.portions = [self.phase.portion(client) for client in range(len(EXAMPLES))]
        values = [self.start_N + self.part.spread(update_n, self.support.numel) for update_n in self.update_Kn]
        owns = [self.support.part(KINDS, (Fraction(0), portion)) for portion in self.portions]
        self.value_KN = [own.only(value_N) for own, value_N in zip(owns, values, strict=True)]

    def played(self) -> Tensor:
        """What the server holds after the round; ``folds`` is then what the base of each layer takes over."""
        kept = Kept(self.part.support.numel)
        for update_n, weight in zip(self.update_Kn, EXAMPLES, strict=True):
            kept.count(weight)
            kept.add(0, update_n, weight)
        server = Server(ServerConfig(), self.start_N)
        server.step(self.part.spread(kept.result(), self.support.numel))
        shares = [weight / sum(EXAMPLES) for weight in EXAMPLES]
        after_N, self.folds = rules.combine(self.pairs, rules.Clients(self.phase, server.offset_N, self.value_KN, shares, self.portions))
        if rules.behaviour(self.phase).restarts:
            restart(self.pairs, after_N, 0, 1)
        return after_N

    def whole(self, pair: Pair, after_N: Tensor) -> Tensor:
        """The product of the factors, and what the base has taken over."""
        left_OQ, right_QI = self.folds.get(pair.layer, (torch.zeros(1, 1), torch.zeros(1, 1)))
        return self.product(pair, after_N) + left_OQ @ right_QI

    def product(self, pair: Pair, value_N: Tensor) -> Tensor:
        b_OR, a_RI = pair.split(value_N.double())
        return pair.scale * b_OR @ a_RI

    def dense(self, pair: Pair) -> Tensor:
        """The mean of the clients' products, formed in full."""
        products = [weight * self.product(pair, value_N) for weight, value_N in zip(EXAMPLES, self.value_KN, strict=True)]
        return torch.stack(products).sum(0) / sum(EXAMPLES)

    def error(self) -> float:
        """The larger distance of a product from the dense mean, relative to the latter's norm."""
        after_N, norm = self.played(), torch.linalg.matrix_norm
        return float(max(norm(self.whole(pair, after_N) - self.dense(pair)) / norm(self.dense(pair)) for pair in self.pairs))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_exact_rules_give_the_mean_of_the_products_and_fedavg_does_not(rule: Rule, at: int) -> None:
    """``svd`` is exact when the rank is the matrix's own; the others at any rank."""
    error = Round(rule, rank=None if rule == "svd" else 3, at=at).error()
    assert error > 0.1 if rule in INEXACT else error < 1e-5


@pytest.mark.parametrize("rule", ["stack", "svd"])
def test_the_products_of_clients_of_different_ranks_are_averaged_exactly(rule: Rule) -> None:
    """Of rank 8 they have 8, 4, 2 and 8: of factors of rank 7 that is 7, 4, 2 and 7, of those of rank 5 it is 5, 3, 2 and 5."""
    played = Round(rule, rank=None, client_ranks=(8, 4, 2))
    assert [int(torch.linalg.matrix_rank(played.product(played.pairs[1], value_N))) for value_N in played.value_KN] == [5, 3, 2, 5]
    assert played.error() < 1e-5
    columns = [left_OQ.shape[1] for left_OQ, _ in played.folds.values()]
    assert columns == ([7 + 4 + 2 + 7, 5 + 3 + 2 + 5] if rule == "stack" else [])


@pytest.mark.parametrize("rule", RULES)
def test_the_head_is_the_mean_under_every_rule(rule: Rule) -> None:
    played = Round(rule, rank=3)
    values = [weight * value_N[played.head] for weight, value_N in zip(EXAMPLES, played.value_KN, strict=True)]
    torch.testing.assert_close(played.played()[played.head], torch.stack(values).sum(0) / sum(EXAMPLES), atol=1e-6, rtol=1e-5)


def test_svd_below_full_rank_is_the_best_approximation() -> None:
    """Eckart and Young: what is missing are the smaller singular values of the mean of the products."""
    played = Round("svd", rank=3)
    after_N = played.played()
    for pair in played.pairs:
        missing = torch.linalg.matrix_norm(played.product(pair, after_N) - played.dense(pair))
        tail = torch.linalg.svdvals(played.dense(pair))[3:]
        assert float(missing) == pytest.approx(math.sqrt(float((tail**2).sum())), rel=1e-5)
        assert missing > 0.1


def test_fedsvd_leaves_orthonormal_rows_in_a() -> None:
    played = Round("fedsvd", rank=3)
    after_N = played.played()
    for pair in played.pairs:
        _, a_RI = pair.split(after_N)
        torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(3), atol=1e-5, rtol=0)


def test_fair_comes_closer_than_fedavg_the_less_its_correction_is_held_back() -> None:
    errors = [Round("fair", rank=3, fair_ridge=ridge).error() for ridge in (1e9, 1.0, 0.01, 0.0)]
    assert errors == sorted(errors, reverse=True) and errors[0] == pytest.approx(Round("fedavg", rank=3).error(), rel=1e-4)
    assert errors[-1] < 0.9 * errors[0]


def test_fair_without_ridge_is_the_least_squares_solution() -> None:
    """No B comes closer to the mean of the products with Abar as it is."""
    played = Round("fair", rank=3, fair_ridge=0.0)
    after_N = played.played()
    for pair in played.pairs:
        b_OR, a_RI = (factor.double() for factor in pair.split(after_N))
        best_OR = torch.linalg.lstsq(a_RI.T, played.dense(pair).T / pair.scale).solution.T
        torch.testing.assert_close(b_OR, best_OR, atol=1e-5, rtol=1e-5)


def test_stack_begins_anew_with_another_a_every_round() -> None:
    played = Round("stack", rank=3)
    first_N, again_N, next_N = played.played(), played.played(), played.start_N.clone()
    restart(played.pairs, next_N, 0, 2)
    assert torch.equal(first_N, again_N)
    for pair in played.pairs:
        assert not first_N[pair.b].any() and not torch.equal(first_N[pair.a], next_N[pair.a])
        assert first_N[pair.a].abs().max() <= pair.in_features**-0.5


def test_what_a_round_does_not_train_does_not_move() -> None:
    ffa, turn = Round("ffa", rank=3), Round("rolora", rank=3, at=1)
    for pair in ffa.pairs:
        assert torch.equal(ffa.played()[pair.a], ffa.start_N[pair.a]) and not torch.equal(ffa.played()[pair.b], ffa.start_N[pair.b])
        assert torch.equal(turn.played()[pair.b], turn.start_N[pair.b]) and not torch.equal(turn.played()[pair.a], turn.start_N[pair.a])


@pytest.mark.parametrize("head", ["[classifier]", "[]"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in INEXACT])
def test_a_round_of_a_run_ends_in_the_mean_of_its_clients_weights(
    rule: Rule, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, trained_K = "bert.encoder.layer.0.attention.self.query", list[tuple[int, Tensor]]()
    update = training.update

    def watched(seat: Any, stage: Any, number: int, client: int) -> Any:
        header, sent_n = update(seat, stage, number, client)
        if number == 3:
            offset_N = stage.held_N + stage.exchange.sends(number).spread(sent_n, stage.coordinates.numel)
            stage.coordinates.write(seat.net, stage.reference_N + offset_N)
            module = seat.net.get_submodule(layer)
            trained_K.append((header.num_examples, (module.base_layer.weight + module.get_delta_weight("default")).detach()))
        return header, sent_n

    monkeypatch.setattr(training, "update", watched)
    lowrank = "method.lowrank={rounds: 3, rank: 64, alpha: 128, lr: 0.01, targets: attention, rule: RULE}".replace("RULE", rule)
    run(tmp_path / "run", "method.name=lora", lowrank, f"model.head={head}", "server.weighting=examples", "clients.per_round=3")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge"]) == 0
    total = sum(examples for examples, _ in trained_K)
    mean = sum((examples / total) * weight for examples, weight in trained_K)
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{layer}.weight"]
    assert len(trained_K) == 3 and torch.allclose(merged, mean, atol=1e-5), float((merged - mean).abs().max())
