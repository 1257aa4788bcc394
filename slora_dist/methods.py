"""The kinds of phase, as choices of coordinates: what trains, how a phase begins, and what it hands to the next.

SLoRA is (sparse, low-rank): at the hand-over rank 0 factors the accumulated update of every target matrix and the next ordinary broadcast
carries the factors. Nothing here knows ranks or transports; nothing elsewhere asks which method runs.

Legend: N coordinates, O/I out/in features, R rank.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from slora_dist.config import DensePhase, LowrankPhase, MethodConfig, SparsePhase
from slora_dist.model import Classifier, dense_layers, head_parameters, is_transposed, ranks
from slora_dist.seeding import derive
from slora_dist.support import Slot, Support
from slora_dist.svd import Factors, factor

AnyPhase = SparsePhase | DensePhase | LowrankPhase


@dataclass(frozen=True)
class Start:
    """Where a phase begins: its first offset, and the share of ``||dW||^2`` kept by the factors, of each matrix and in all."""

    offset_N: Tensor
    kept_energy: dict[str, float] = field(default_factory=dict)
    kept_energy_total: float | None = None


def names(method: MethodConfig) -> tuple[str, ...]:
    """Return a name for each phase: its kind, numbered when the kind comes again (``lowrank``, ``lowrank-2``)."""
    kinds = [phase.kind for phase in method.resolved()]
    return tuple(kind if kinds[:at].count(kind) == 0 else f"{kind}-{kinds[:at].count(kind) + 1}" for at, kind in enumerate(kinds))


def support(phase: AnyPhase, classifier: Classifier, method: MethodConfig, seed: int) -> Support:
    """Return the coordinates of a phase on a classifier; shapes suffice, so a shell will do. The head is dense in every phase."""
    head = head_parameters(classifier)
    shapes = {base_name(name): tuple(parameter.shape) for name, parameter in classifier.net.named_parameters() if "lora_" not in name}
    slots = [Slot.whole(name, shapes[name], "head") for name in head]
    if isinstance(phase, LowrankPhase):
        return Support(slots + _factor_slots(phase, classifier))
    backbone = [name for name in shapes if name not in set(head)]
    if isinstance(phase, DensePhase):
        return Support(slots + [Slot.whole(name, shapes[name], "value") for name in backbone])
    if phase.scope == "targets":
        backbone = [f"{layer}.weight" for layer in ranks(classifier, method.lowrank)]
    masked = (Slot.masked(name, shapes[name], phase.density, phase.mask, derive(seed, "mask", name)) for name in backbone)
    return Support([*slots, *masked])


def enter(phase: AnyPhase, classifier: Classifier, coordinates: Support) -> None:
    """Make the network ready for a phase: adapters of an earlier phase leave, those of this one come in, and only its slots train."""
    remove_adapters(classifier.net)
    if isinstance(phase, LowrankPhase):
        config = LoraConfig(init_lora_weights=False, **lora_settings(phase, classifier))
        inject_adapter_in_model(config, classifier.net)
    for parameter in classifier.net.parameters():
        parameter.requires_grad_(False)
    for slot in coordinates.slots:
        classifier.net.get_parameter(slot.name).requires_grad_(True)


def lora_settings(phase: LowrankPhase, classifier: Classifier) -> dict[str, Any]:
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


def begin(
    phase: AnyPhase,
    classifier: Classifier,
    coordinates: Support,
    delta: Mapping[str, Tensor],
    seed: int,
    found: Mapping[str, Factors] | None = None,
) -> Start:
    """Return where a phase begins, given what was learned so far (``delta``: {parameter: update}; empty at the start of a run).

    ``found`` are the factors of its layers where they are known already (see ``factored``).
    """
    if not isinstance(phase, LowrankPhase):
        return Start(_carry(coordinates, delta))
    found = factored(phase, classifier, delta) if found is None else found
    layers = dense_layers(classifier)
    factors = {
        layer: (found[layer].b_OR, found[layer].a_RI)
        if layer in found
        else _random_factors(layers[layer], rank, derive(seed, "lora_A", layer))
        for layer, rank in ranks(classifier, phase).items()
    }
    named = {name: tensor for layer, (b_OR, a_RI) in factors.items() for name, tensor in zip(_names(layer), (a_RI, b_OR), strict=True)}
    energy = sum(result.energy for result in found.values())
    total = sum(result.kept_energy * result.energy for result in found.values()) / energy if energy else None
    return Start(_carry(coordinates, {**delta, **named}), {layer: result.kept_energy for layer, result in found.items()}, total)


def factored(
    phase: LowrankPhase, classifier: Classifier, delta: Mapping[str, Tensor], layers: Sequence[str] | None = None
) -> dict[str, Factors]:
    """Return the factors of the update of every target layer, or of ``layers``; a layer without an update has none."""
    found = {}
    for layer, rank in ranks(classifier, phase).items():
        update = delta.get(f"{layer}.weight")
        if update is not None and (layers is None or layer in layers):
            update_OI = update.T if is_transposed(classifier, layer) else update
            found[layer] = factor(update_OI, rank, _alpha(phase, rank) / rank, phase.split)
    return found


def factorable(phase: AnyPhase, classifier: Classifier, coordinates: Support) -> list[str]:
    """Return the target layers of which ``coordinates``, those of the phase before, have learned an update."""
    if not isinstance(phase, LowrankPhase):
        return []
    moved = {slot.name.removesuffix(".lora_B.default.weight").removesuffix(".weight") for slot in coordinates.slots}
    return [layer for layer in ranks(classifier, phase) if layer in moved]


def learned(phase: AnyPhase, classifier: Classifier, coordinates: Support, offset_N: Tensor) -> dict[str, Tensor]:
    """Return the update of every base parameter that an offset stands for: {parameter: update in its shape}; factors multiplied out."""
    delta = coordinates.densify(offset_N)
    if not isinstance(phase, LowrankPhase):
        return delta
    for layer, rank in ranks(classifier, phase).items():
        a_RI, b_OR = (delta.pop(name) for name in _names(layer))
        product_OI = (_alpha(phase, rank) / rank) * (b_OR @ a_RI)
        delta[f"{layer}.weight"] = product_OI.T.contiguous() if is_transposed(classifier, layer) else product_OI
    return delta


def keeps(phase: AnyPhase) -> bool:
    """Whether the phase folds something of the previous one into the frozen base."""
    return isinstance(phase, LowrankPhase) and "keep" in (phase.residual, phase.remainder)


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


@torch.no_grad()
def add_to_base(classifier: Classifier, change: Mapping[str, Tensor]) -> None:
    """Add updates to base parameters in place."""
    for name, update in change.items():
        parameter = classifier.net.get_parameter(parameter_name(name, classifier.net))
        parameter.add_(update.to(parameter.device))


def base_weights(classifier: Classifier, names: Iterable[str]) -> dict[str, Tensor]:
    """Return base parameters as they are now, by the names that they have without adapters."""
    return {name: classifier.net.get_parameter(parameter_name(name, classifier.net)).detach().clone() for name in names}


def base_name(name: str) -> str:
    """Return a parameter's name as it is without adapters."""
    return name.replace(".base_layer.", ".")


def parameter_name(name: str, net: nn.Module) -> str:
    """Return the name that the network has now for a base parameter: within an adapted layer it is ``layer.base_layer.weight``."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if hasattr(net.get_submodule(module), "base_layer") else name


def _factor_slots(phase: LowrankPhase, classifier: Classifier) -> list[Slot]:
    layers, slots = dense_layers(classifier), []
    for layer, rank in ranks(classifier, phase).items():
        out_features, in_features = layers[layer]
        a_name, b_name = _names(layer)
        slots += [Slot.whole(a_name, (rank, in_features), "factor_a"), Slot.whole(b_name, (out_features, rank), "factor_b")]
    return slots


def _names(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def _alpha(phase: LowrankPhase, rank: int) -> float:
    return float(rank) if phase.alpha is None else phase.alpha


def _random_factors(shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """LoRA's own start: A uniform in +-1/sqrt(I) (Kaiming with a = sqrt(5)), B zero."""
    out_features, in_features = shape
    bound = 1 / math.sqrt(in_features)
    a_RI = torch.empty(rank, in_features).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(out_features, rank), a_RI


def _carry(coordinates: Support, delta: Mapping[str, Tensor]) -> Tensor:
    """Return the offset whose entries are those of ``delta``, zero where it has none."""
    offset_N = torch.zeros(coordinates.numel)
    for slot, span in coordinates.spans():
        if slot.name in delta:
            offset_N[span] = slot.take(delta[slot.name])
    return offset_N


def remove_adapters(net: nn.Module) -> None:
    """Put the plain layers back in the place of adapted ones."""
    for name, module in list(net.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.base_layer)
    net.__dict__.pop("peft_config", None)  # peft's note that it has been here
