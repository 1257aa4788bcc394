"""The kinds of phase, as choices of coordinates: what trains, how a phase begins, and what it hands to the next.

SLoRA is (sparse, low-rank): at the hand-over rank 0 factors the accumulated update of every target matrix and the next ordinary broadcast
carries the factors. Nothing here knows ranks or transports; nothing elsewhere asks which method runs.

Legend: N coordinates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slora_dist.config import AnyPhase, DensePhase, LowrankPhase, MethodConfig
from slora_dist.methods import lowrank
from slora_dist.methods.base import base_name, remove_adapters
from slora_dist.model import Classifier, head_parameters, ranks
from slora_dist.seeding import derive
from slora_dist.support import Slot, Support
from slora_dist.svd import Factors


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
        return Support(slots + lowrank.slots(phase, classifier))
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
        lowrank.inject(phase, classifier)
    for parameter in classifier.net.parameters():
        parameter.requires_grad_(False)
    for slot in coordinates.slots:
        classifier.net.get_parameter(slot.name).requires_grad_(True)


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
    found = lowrank.factored(phase, classifier, delta) if found is None else found
    factors = lowrank.start(phase, classifier, found, seed)
    energy = sum(result.energy for result in found.values())
    total = sum(result.kept_energy * result.energy for result in found.values()) / energy if energy else None
    return Start(_carry(coordinates, {**delta, **factors}), {layer: result.kept_energy for layer, result in found.items()}, total)


def learned(phase: AnyPhase, classifier: Classifier, coordinates: Support, offset_N: Tensor) -> dict[str, Tensor]:
    """Return the update of every base parameter that an offset stands for: {parameter: update in its shape}; factors multiplied out."""
    delta = coordinates.densify(offset_N)
    return lowrank.multiplied(phase, classifier, delta) if isinstance(phase, LowrankPhase) else delta


def _carry(coordinates: Support, delta: Mapping[str, Tensor]) -> Tensor:
    """Return the offset whose entries are those of ``delta``, zero where it has none."""
    offset_N = torch.zeros(coordinates.numel)
    for slot, span in coordinates.spans():
        if slot.name in delta:
            offset_N[span] = slot.take(delta[slot.name])
    return offset_N
