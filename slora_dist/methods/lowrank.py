"""Low-rank phases: peft's LoRA, its factors as coordinates, and what they take over at a switch.

Legend: O/I out/in features, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from slora_dist.aggregate.factors import Pair, random_factors
from slora_dist.aggregate.rules import behaviour
from slora_dist.completion import complete, truncate
from slora_dist.config import AnyPhase, LowrankPhase
from slora_dist.methods.base import parameter_name
from slora_dist.model import TaskModel, dense_layers, is_transposed, ranks
from slora_dist.seeding import derive
from slora_dist.support import Slot, Support
from slora_dist.svd import Factors, factor


def lora_settings(phase: LowrankPhase, classifier: TaskModel) -> dict[str, Any]:
    """Return peft's settings for a phase on a classifier: exact layer names, their ranks and alphas."""
    by_layer = ranks(classifier, phase)
    return {
        "fan_in_fan_out": any(is_transposed(classifier, layer) for layer in by_layer),
        "r": phase.rank,
        "lora_alpha": _alpha(phase, phase.rank),
        "lora_dropout": phase.dropout,
        "target_modules": list(by_layer),
        "rank_pattern": dict(by_layer),
        "alpha_pattern": {layer: _alpha(phase, rank) for layer, rank in by_layer.items()},
    }


def slots(phase: LowrankPhase, classifier: TaskModel) -> list[Slot]:
    """Return the slots of both factors of every target layer."""
    layers, found = dense_layers(classifier), list[Slot]()
    for layer, rank in ranks(classifier, phase).items():
        out_features, in_features = layers[layer]
        a_name, b_name = _names(layer)
        found += [Slot.whole(a_name, (rank, in_features), "factor_a"), Slot.whole(b_name, (out_features, rank), "factor_b")]
    return found


def inject(phase: LowrankPhase, classifier: TaskModel) -> None:
    """Let peft adapt the target layers in place."""
    inject_adapter_in_model(LoraConfig(init_lora_weights=False, **lora_settings(phase, classifier)), classifier.net)


def start(phase: LowrankPhase, classifier: TaskModel, found: Mapping[str, Factors], seed: int) -> dict[str, Tensor]:
    """Return the factors with which the phase begins, by parameter name: those ``found`` at the switch, LoRA's own start elsewhere."""
    layers, factors = dense_layers(classifier), dict[str, Tensor]()
    for layer, rank in ranks(classifier, phase).items():
        if layer in found:
            b_OR, a_RI = found[layer].b_OR, found[layer].a_RI
        else:
            b_OR, a_RI = random_factors(*layers[layer], rank, derive(seed, "lora_A", layer))
        factors |= dict(zip(_names(layer), (a_RI, b_OR), strict=True))
    return factors


def multiplied(phase: LowrankPhase, classifier: TaskModel, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``delta`` with the factors of every target layer multiplied out to the update of its weight."""
    updates = dict(delta)
    for layer, rank in ranks(classifier, phase).items():
        a_RI, b_OR = (updates.pop(name) for name in _names(layer))
        product_OI = (_alpha(phase, rank) / rank) * (b_OR @ a_RI)
        updates[f"{layer}.weight"] = as_stored(classifier, layer, product_OI)
    return updates


def factored(
    phase: AnyPhase, classifier: TaskModel, delta: Mapping[str, Tensor], before: Support, layers: Sequence[str] | None = None
) -> dict[str, Factors]:
    """Return the factors of the update of every target layer, or of ``layers``, that the phase takes over.

    ``before`` are the coordinates that have learned ``delta``: its masks say which entries are observed. A layer without an update has no
    factors, and neither has any where the phase starts anew.
    """
    masks, found = {slot.name: slot.index for slot in before.slots}, dict[str, Factors]()
    for layer in factorable(phase, classifier, before) if layers is None else layers:
        assert isinstance(phase, LowrankPhase)
        rank, update_OI, observed_n = ranks(classifier, phase)[layer], delta[f"{layer}.weight"], masks.get(f"{layer}.weight")
        if is_transposed(classifier, layer):
            if observed_n is not None:
                observed_n = observed_n % update_OI.shape[1] * update_OI.shape[0] + observed_n // update_OI.shape[1]
            update_OI = update_OI.T
        scale = _alpha(phase, rank) / rank
        if phase.init == "completion":
            found[layer] = complete(update_OI, observed_n, rank, scale, phase.split, phase.magnitude)
        else:
            found[layer] = truncate(update_OI, observed_n, rank, scale, phase.split)
    return found


@torch.no_grad()
def reduce_base(phase: AnyPhase, classifier: TaskModel) -> dict[str, Factors]:
    """Take the best rank-r part out of the base weight of every target layer, and return it as the factors with which the phase begins.

    PiSSA (Meng et al. 2024) and FeDeRA (Yan et al. 2024), W_0 = (W_0 - scale B A) + scale B A with B = U_r S_r^1/2, A = S_r^1/2 V_r^T:
    the model is the same, and what trains are its largest directions. With another init nothing is done.
    """
    if not isinstance(phase, LowrankPhase) or phase.init != "pissa":
        return {}
    found = {}
    for layer, rank in ranks(classifier, phase).items():
        weight = classifier.net.get_parameter(parameter_name(f"{layer}.weight", classifier.net))
        weight_OI = weight.T if is_transposed(classifier, layer) else weight
        scale = _alpha(phase, rank) / rank
        found[layer] = factor(weight_OI, rank, scale, "sqrt")
        weight_OI -= (scale * (found[layer].b_OR @ found[layer].a_RI)).to(weight.device)
    return found


def factorable(phase: AnyPhase, classifier: TaskModel, coordinates: Support) -> list[str]:
    """Return the target layers of which ``coordinates``, those of the phase before, have learned an update that the phase takes over."""
    if not isinstance(phase, LowrankPhase) or phase.init == "kaiming":
        return []
    moved = {slot.name.removesuffix(".lora_B.default.weight").removesuffix(".weight") for slot in coordinates.slots}
    return [layer for layer in ranks(classifier, phase) if layer in moved]


def pairs(phase: AnyPhase, classifier: TaskModel, coordinates: Support) -> list[Pair]:
    """Return where the factors of every target layer lie in the vector of ``coordinates``; none in a phase without factors."""
    if not isinstance(phase, LowrankPhase):
        return []
    spans, found = {slot.name: span for slot, span in coordinates.spans()}, []
    for layer, rank in ranks(classifier, phase).items():
        a, b = (spans[name] for name in _names(layer))
        found.append(Pair(layer, a, b, rank, _alpha(phase, rank) / rank))
    return found


def keeps(phase: AnyPhase) -> bool:
    """Whether the phase folds something of the previous one into the frozen base."""
    return isinstance(phase, LowrankPhase) and "keep" in (phase.residual, phase.remainder)


def base_moves(phases: Sequence[AnyPhase], next_phase: AnyPhase | None = None) -> bool:
    """Whether the frozen base is another one after these phases, or once ``next_phase`` has begun after them."""
    kept = any(keeps(phase) for phase in [*phases, next_phase][1:] if phase)
    return kept or any(behaviour(phase).fold for phase in phases)


def as_stored(classifier: TaskModel, layer: str, update_OI: Tensor) -> Tensor:
    """Return the update of a layer's weight as the layer stores it."""
    return update_OI.T.contiguous() if is_transposed(classifier, layer) else update_OI


def base_change(phase: LowrankPhase, before: Mapping[str, Tensor], factors: Mapping[str, Tensor], head: list[str]) -> dict[str, Tensor]:
    """Return what the base takes over: dW - scale B0 A0 of targets (``residual: keep``), dW of the rest (``remainder: keep``)."""
    change = {}
    for name, update in before.items():
        if name in head:
            continue  # it goes on as coordinates
        if name in factors and phase.residual == "keep":
            change[name] = update - factors[name]
        elif name not in factors and phase.remainder == "keep":
            change[name] = update
    return change


def _names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def _alpha(phase: LowrankPhase, rank: int) -> float:
    return float(rank) if phase.alpha is None else phase.alpha
