"""The kinds of phase, as choices of coordinates: what trains, how a phase begins, and what it hands to the next.

SLoRA is (sparse, low-rank): at the hand-over rank 0 factors the accumulated update of every target matrix and the next ordinary broadcast
carries the factors. Nothing here knows ranks or transports; nothing elsewhere asks which method runs.

Legend: N coordinates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slora_dist.config import (
    AnyPhase,
    BitfitPhase,
    DensePhase,
    HeadPhase,
    HoulsbyPhase,
    LowrankPhase,
    MethodConfig,
    PfeifferPhase,
    SparsePhase,
)
from slora_dist.errors import ConfigError
from slora_dist.methods import bottleneck, lowrank, sparse
from slora_dist.methods.base import base_shapes, remove_adapters
from slora_dist.methods.sparse import Chosen, Shapes
from slora_dist.model import TaskModel, head_parameters
from slora_dist.support import Slot, Support
from slora_dist.svd import Factors


@dataclass(frozen=True)
class Start:
    """Where a phase begins: its first offset, and the factors of the update that it takes over, by layer."""

    offset_N: Tensor
    found: Mapping[str, Factors] = field(default_factory=dict)

    def shares(self, kind: Literal["kept_energy", "observed_residual"]) -> tuple[dict[str, float], float | None]:
        """Return a share of ``||dW||^2`` for every matrix and, unless there is nothing, for all of them together."""
        by_layer = {layer: getattr(factors, kind) for layer, factors in self.found.items()}
        energy = sum(factors.energy for factors in self.found.values())
        total = sum(by_layer[layer] * factors.energy for layer, factors in self.found.items()) / energy if energy else None
        return by_layer, total


def names(method: MethodConfig) -> tuple[str, ...]:
    """Return a name for each phase: its kind, numbered when the kind comes again (``lowrank``, ``lowrank-2``)."""
    kinds = [phase.kind for phase in method.resolved()]
    return tuple(kind if kinds[:at].count(kind) == 0 else f"{kind}-{kinds[:at].count(kind) + 1}" for at, kind in enumerate(kinds))


def support(phase: AnyPhase, classifier: TaskModel, method: MethodConfig, seed: int, chosen: Chosen | None = None) -> Support:
    """Return the coordinates of a phase on a classifier; shapes suffice, so a shell will do. The head is dense in every phase.

    Masks that are chosen by gradient are ``chosen``, {parameter: flat positions}, or not known yet; those chosen by magnitude are known
    where the network holds the weights of the phase's base. Raises ``ConfigError`` when the model has nothing that the phase could train.
    """
    shapes = base_shapes(classifier.net)
    head = {name: shapes.pop(name) for name in head_parameters(classifier)}
    slots = [Slot.whole(name, shape, "head") for name, shape in head.items()]
    found = Support(slots + _slots(phase, classifier, method, seed, shapes, chosen))
    if not found.numel:
        setting = "method.sparse.density" if isinstance(phase, SparsePhase) else "model.head"
        raise ConfigError(setting, f"the {phase.kind} phase has nothing to train", "a head, or a mask that keeps an entry")
    return found


def _slots(phase: AnyPhase, classifier: TaskModel, method: MethodConfig, seed: int, shapes: Shapes, chosen: Chosen | None) -> list[Slot]:
    """Return the slots of a phase besides the head; ``shapes`` are those of the backbone."""
    match phase:
        case LowrankPhase():
            return lowrank.slots(phase, classifier)
        case DensePhase():
            return [Slot.whole(name, shape, "value") for name, shape in shapes.items()]
        case BitfitPhase():
            return biases(shapes)
        case HoulsbyPhase() | PfeifferPhase():
            return bottleneck.slots(phase, classifier)
        case SparsePhase():
            return sparse.slots(phase, classifier, method, seed, shapes, chosen)
        case HeadPhase():
            return []


def biases(shapes: Shapes) -> list[Slot]:
    """Return the slots of BitFit (Ben Zaken et al. 2022): every bias, those of the norms included."""
    found = [Slot.whole(name, shape, "bias") for name, shape in shapes.items() if name.endswith(".bias")]
    if not found:
        raise ConfigError("method.name", "bitfit on a model whose backbone has no biases", "another method, or a model with biases")
    return found


def enter(phase: AnyPhase, classifier: TaskModel, coordinates: Support, seed: int) -> None:
    """Make the network ready for a phase: adapters of an earlier phase leave, those of this one come in, and only its slots train."""
    remove_adapters(classifier.net)
    if isinstance(phase, LowrankPhase):
        lowrank.inject(phase, classifier)
    elif isinstance(phase, HoulsbyPhase | PfeifferPhase):
        bottleneck.insert(phase, classifier, seed)
    for parameter in classifier.net.parameters():
        parameter.requires_grad_(False)
    for slot in coordinates.slots:
        classifier.net.get_parameter(slot.name).requires_grad_(True)


def begin(
    phase: AnyPhase,
    classifier: TaskModel,
    coordinates: Support,
    delta: Mapping[str, Tensor],
    seed: int,
    found: Mapping[str, Factors] | None = None,
) -> Start:
    """Return where a phase begins, given what was learned so far (``delta``: {parameter: update}; empty at the start of a run).

    ``found`` are the factors of its layers that do not start anew (see ``factored`` and ``reduce_base``).
    """
    if not isinstance(phase, LowrankPhase):
        return Start(_carry(coordinates, delta))
    factors = lowrank.start(phase, classifier, found or {}, seed)
    return Start(_carry(coordinates, {**delta, **factors}), found or {})


def learned(phase: AnyPhase, classifier: TaskModel, coordinates: Support, offset_N: Tensor) -> dict[str, Tensor]:
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
