"""A method's choice of coordinates: which scalars of a model move, seen as one flat vector.

Optimiser, codec, collective, aggregator, ledger and checkpoint know only such vectors; this file alone knows where each number lives.

Legend: N coordinates, n those of a part, O/I out/in features. A *value* is the weight itself; an *offset* is its difference from the
reference that every rank knows without a message (the pretrained weight; zero for a LoRA factor). Offsets are what travels, what the
server holds, and what a sparse phase hands over: the accumulated update.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from slora_dist import masks
from slora_dist.masks import Pattern
from slora_dist.seeding import derive

Kind = Literal["value", "bias", "norm", "adapter", "factor_a", "factor_b", "head", "variate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Band = tuple[Fraction, Fraction]  # of every factor's rank the share from .. up to ..; what is no factor belongs to what begins at 0
WHOLE: Band = (Fraction(0), Fraction(1))


@dataclass(frozen=True)
class Slot:
    """The trainable entries of one parameter: all of them, or the ``count`` that a mask keeps, drawn from ``mask_seed`` or ``chosen``.

    With ``grid`` = (rows, columns) the mask keeps every crossing of as many rows and columns of a matrix, else single entries. A mask that
    is chosen by what the weights are is not known from shapes alone: until then its slot knows its size only.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    count: int
    mask_seed: int | None = None
    grid: tuple[int, int] | None = None
    chosen: Tensor | None = field(default=None, compare=False, repr=False)  # flat positions, ascending

    @staticmethod
    def whole(name: str, shape: Sequence[int], kind: Kind) -> "Slot":
        """Return the slot of an entire parameter."""
        return Slot(name, tuple(shape), kind, prod(shape))

    @staticmethod
    def masked(name: str, shape: Sequence[int], density: float, pattern: Pattern, seed: int) -> "Slot":
        """Return the slot of the entries that a mask keeps: exactly round(density x numel), or the nearest whole rows and columns."""
        cells = masks.grid(shape, density, pattern)
        return Slot(name, tuple(shape), "value", prod(cells) if cells else masks.kept(prod(shape), density), seed, cells)

    @staticmethod
    def picked(name: str, shape: Sequence[int], density: float, chosen: Tensor | None) -> "Slot":
        """Return the slot of the round(density x numel) entries that were ``chosen``, or will be."""
        count = masks.kept(prod(shape), density)
        assert chosen is None or len(chosen) == count
        return Slot(name, tuple(shape), "value", count, chosen=chosen)

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor] | None:
        """Row and column numbers (int64, ascending) whose crossings a structured mask keeps; None without structure."""
        if self.mask_seed is None or self.grid is None:
            return None
        sides = zip(("rows", "columns"), self.shape, self.grid, strict=True)
        rows_r, columns_c = (masks.random_mask(length, count, derive(self.mask_seed, side)) for side, length, count in sides)
        return rows_r, columns_c

    @cached_property
    def index(self) -> Tensor | None:
        """Flat positions of the kept entries, ascending; None when all are kept."""
        if self.mask_seed is None:
            assert self.chosen is not None or self.count == prod(self.shape), f"the mask of {self.name} is not chosen yet"
            return self.chosen
        if self.axes is None:
            return masks.random_mask(prod(self.shape), self.count, self.mask_seed)
        rows_r, columns_c = self.axes
        return (rows_r[:, None] * self.shape[1] + columns_c).reshape(-1)

    @cached_property
    def _path(self) -> tuple[list[str], str]:
        *modules, leaf = self.name.split(".")
        return modules, leaf

    def of(self, model: nn.Module) -> nn.Parameter:
        """Return the parameter of ``model`` as it is now: what ``get_parameter`` does, a hundred times in a round, with less ado."""
        modules, leaf = self._path
        for name in modules:
            model = model._modules[name]  # type: ignore[assignment]
        parameter = model._parameters[leaf]
        assert parameter is not None
        return parameter

    def take(self, dense: Tensor) -> Tensor:
        """Return the kept entries of ``dense`` (the parameter, or its gradient) as a flat vector."""
        flat = dense.detach().reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index.to(flat.device))

    def put(self, dense: Tensor, entries: Tensor) -> None:
        """Write ``entries`` over the kept entries of ``dense``; every other entry keeps its bits."""
        if self.index is None:
            dense.copy_(entries.view(self.shape))
        else:
            dense.view(-1).index_copy_(0, self.index.to(dense.device), entries.to(dense.dtype))

    def spread(self, entries: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape with ``entries`` at the kept entries and zero elsewhere."""
        dense = torch.zeros(self.shape, dtype=entries.dtype, device=entries.device)
        self.put(dense, entries)
        return dense


class Support:
    """The coordinates of one phase: slots one after the other, ordered by kind so that each kind is one stretch of the vector."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(sorted((slot for slot in slots if slot.count), key=lambda slot: KINDS.index(slot.kind)))
        self.numel = sum(slot.count for slot in self.slots)
        self._counts: dict[Kind, int] = {}
        for slot in self.slots:
            self._counts[slot.kind] = self._counts.get(slot.kind, 0) + slot.count

    def spans(self) -> Iterator[tuple[Slot, slice]]:
        """Yield each slot with its stretch of the vector."""
        start = 0
        for slot in self.slots:
            yield slot, slice(start, start + slot.count)
            start += slot.count

    def counts(self) -> Mapping[Kind, int]:
        """Return the number of coordinates of each kind that there is, in vector order."""
        return self._counts

    def part(self, kinds: Collection[Kind], band: Band = WHOLE) -> "Part":
        """Return the coordinates of some kinds, of factors those within ``band``, as a part of these."""
        if kinds and band == WHOLE and all(slot.kind in kinds for slot in self.slots):
            return Part(self, None)
        chosen = [_banded(slot, span, band) for slot, span in self.spans() if slot.kind in kinds]
        places = [places_n for _, places_n in chosen]
        return Part(Support([slot for slot, _ in chosen]), torch.cat(places) if places else torch.empty(0, dtype=torch.int64))

    def read(self, model: nn.Module) -> Tensor:
        """Return the model's values at the coordinates, float32 of length N."""
        return torch.cat([slot.take(slot.of(model)).float() for slot in self.slots])

    @torch.no_grad()
    def write(self, model: nn.Module, values_N: Tensor) -> None:
        """Write the values into the model; no other weight moves by one bit."""
        for slot, span in self.spans():
            slot.put(slot.of(model), values_N[span])

    def require_grad(self, model: nn.Module, whole: "Support") -> None:
        """Let of the parameters of ``whole`` those train that this support, a part of it, has slots in."""
        own = {slot.name for slot in self.slots}
        for slot in whole.slots:
            slot.of(model).requires_grad_(slot.name in own)

    def densify(self, offset_N: Tensor) -> dict[str, Tensor]:
        """Return the offset of each parameter in its own shape, zero where nothing is trained."""
        return {slot.name: slot.spread(offset_N[span]) for slot, span in self.spans()}

    def reference(self, model: nn.Module) -> Tensor:
        """Return what every rank knows without a message: the model's values, with zero for LoRA factors (length N)."""
        reference_N = self.read(model)
        for slot, span in self.spans():
            if slot.kind in ("factor_a", "factor_b"):
                reference_N[span] = 0
        return reference_N

    def fingerprint(self, reference_N: Tensor) -> bytes:
        """Return 32 bytes that are equal on two ranks if names, shapes, masks and reference are."""
        digest = hashlib.sha256()
        for slot in self.slots:
            digest.update(repr((slot.name, slot.shape, slot.kind, slot.count)).encode())
            if slot.index is not None:
                digest.update(slot.index.numpy().tobytes())
        digest.update(reference_N.cpu().numpy().tobytes())
        return digest.digest()


@dataclass(frozen=True)
class Part:
    """Some coordinates of a support of N, as a support of their own: ``index_n`` are their places in the whole, None for all of it."""

    support: Support
    index_n: Tensor | None

    def take(self, whole_N: Tensor) -> Tensor:
        """Return the part's entries of a vector of the whole."""
        return whole_N if self.index_n is None else whole_N[self.index_n.to(whole_N.device)]

    def merge(self, whole_N: Tensor, part_n: Tensor) -> Tensor:
        """Return a vector of the whole with the part's entries from ``part_n`` and the others' bits as they are; ``whole_N`` is used up."""
        if self.index_n is None:
            return part_n
        whole_N[self.index_n.to(whole_N.device)] = part_n
        return whole_N

    def spread(self, part_n: Tensor, numel: int) -> Tensor:
        """Return a vector of the whole, of ``numel`` entries, that is zero but for the part."""
        return part_n if self.index_n is None else self.merge(torch.zeros(numel, dtype=part_n.dtype), part_n)

    def only(self, whole_N: Tensor) -> Tensor:
        """Return a vector of the whole with zeros outside the part."""
        return self.spread(self.take(whole_N), whole_N.numel())


def leading(rank: int, portion: Fraction) -> int:
    """Return how many of ``rank`` a portion is, rounded up."""
    return math.ceil(portion * rank)


def _banded(slot: Slot, span: slice, band: Band) -> tuple[Slot, Tensor]:
    """Return what a slot has within a band, rows of A or columns of B, and the places of that."""
    places_n = torch.arange(span.start, span.stop)
    if slot.kind not in ("factor_a", "factor_b"):
        return (slot, places_n) if not band[0] else (Slot.whole(slot.name, (0,), slot.kind), places_n[:0])
    axis = int(slot.kind == "factor_b")
    low, high = (leading(slot.shape[axis], end) for end in band)
    places = places_n.view(slot.shape).narrow(axis, low, high - low)
    return Slot.whole(slot.name, places.shape, slot.kind), places.reshape(-1)
