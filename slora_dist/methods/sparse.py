"""Sparse phases: which tensors are masked, and by which of the masks."""

from collections.abc import Mapping, Sequence
from math import prod

from torch import Tensor

from slora_dist import masks
from slora_dist.config import MethodConfig, SparsePhase
from slora_dist.model import TaskModel, targets
from slora_dist.seeding import derive
from slora_dist.support import Slot

Shapes = Mapping[str, Sequence[int]]  # {parameter: its shape}
Chosen = Mapping[str, Tensor]  # {parameter: flat positions that a mask keeps, ascending}


def slots(phase: SparsePhase, classifier: TaskModel, method: MethodConfig, seed: int, shapes: Shapes, chosen: Chosen | None) -> list[Slot]:
    """Return the slots of every masked tensor; ``shapes`` are those of the backbone."""
    return [_slot(phase, classifier, seed, name, shape, chosen) for name, shape in masked(phase, classifier, method, shapes).items()]


def masked(phase: SparsePhase, classifier: TaskModel, method: MethodConfig, shapes: Shapes) -> dict[str, Sequence[int]]:
    """Return {parameter: shape} of what the mask covers: all of the backbone, or the matrices that LoRA would adapt."""
    names = list(shapes) if phase.scope == "all" else [f"{layer}.weight" for layer in targets(classifier, method.lowrank)]
    return {name: shapes[name] for name in names}


def _slot(phase: SparsePhase, classifier: TaskModel, seed: int, name: str, shape: Sequence[int], chosen: Chosen | None) -> Slot:
    if phase.mask == "gradient":
        return Slot.picked(name, shape, phase.density, chosen.get(name) if chosen else None)
    if phase.mask == "magnitude":
        weight = classifier.net.get_parameter(name)
        known = None if weight.is_meta else masks.largest(weight.abs(), masks.kept(prod(shape), phase.density))
        return Slot.picked(name, shape, phase.density, known)
    return Slot.masked(name, shape, phase.density, phase.mask, derive(seed, "mask", name))
