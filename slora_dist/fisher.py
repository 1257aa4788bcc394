"""Masks that follow the gradients of the clients' documents: what clients send for them, and what they get.

An entry's score is the mean of its squared gradients, one document at a time: the diagonal of the empirical Fisher information at the
pretrained weights (FISH masks: Sung et al. 2021, arXiv 2111.09839). Every client of the first round sends its scores once, rank 0 keeps
the largest of their mean in each tensor, and the mask goes to all clients once, as a bit for each entry or as int32 positions within each
tensor, whichever is shorter.

Legend: M entries of all masked tensors, B bytes.
"""

import time
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from slora_dist import masks
from slora_dist.client import Update, bearing
from slora_dist.config import AnyPhase, SparsePhase
from slora_dist.data.tokens import Encoded, batches, order
from slora_dist.linear import fast
from slora_dist.seeding import derive
from slora_dist.support import Slot, Support
from slora_dist.wire import Wire


class Selection:
    """The messages by which the masks of some slots are chosen; ``wire`` is that of the scores."""

    def __init__(self, slots: list[Slot]) -> None:
        self._counts = {slot.name: slot.count for slot in slots}
        self.scores = Support([Slot.whole(slot.name, slot.shape, "value") for slot in slots])
        self.wire = Wire(self.scores, "float32", "implicit")
        self._as_bits = -(-self.scores.numel // 8) < 4 * sum(self._counts.values())

    @property
    def up(self) -> dict[str, int]:
        """The bytes of a client's scores, by kind."""
        return {"fisher": self.wire.nbytes}

    @property
    def down(self) -> dict[str, int]:
        """The bytes of the mask, by kind."""
        return {"mask": -(-self.scores.numel // 8) if self._as_bits else 4 * sum(self._counts.values())}

    def choose(self, fisher_M: Tensor) -> Tensor:
        """Return the mask of the largest scores of every tensor, as bytes."""
        spans = {slot.name: span for slot, span in self.scores.spans()}
        chosen = {name: masks.largest(fisher_M[span], self._counts[name]) for name, span in spans.items()}
        if not self._as_bits:
            return torch.cat([index.int() for index in chosen.values()]).view(torch.uint8)
        kept_M = np.zeros(self.scores.numel, dtype=np.bool_)
        for name, index in chosen.items():
            kept_M[spans[name]][index.numpy()] = True
        return torch.from_numpy(np.packbits(kept_M))

    def read(self, mask_B: Tensor) -> dict[str, Tensor]:
        """Return {parameter: flat positions, ascending} of a mask."""
        if not self._as_bits:
            pieces = torch.split(mask_B.view(torch.int32).long(), [self._counts[slot.name] for slot in self.scores.slots])
            return dict(zip((slot.name for slot in self.scores.slots), pieces, strict=True))
        kept_M = np.unpackbits(mask_B.numpy(), count=self.scores.numel)
        return {slot.name: torch.from_numpy(np.flatnonzero(kept_M[span])) for slot, span in self.scores.spans()}


def selection(phase: AnyPhase, coordinates: Support) -> Selection | None:
    """Return how the masks of a phase are chosen by gradients; None where they are not."""
    if not isinstance(phase, SparsePhase) or phase.mask != "gradient":
        return None
    masked = [slot for slot in coordinates.slots if slot.kind == "value" and slot.count < prod(slot.shape)]
    return Selection(masked) if masked else None


def score(net: nn.Module, scores: Support, documents: Encoded, count: int, pad: int, seed: int) -> Update:
    """Do what ``squared_gradients`` does, where a client that fails is left out of the choice."""
    return bearing(lambda: squared_gradients(net, scores, documents, count, pad, seed), net, scores.numel)


def squared_gradients(net: nn.Module, scores: Support, documents: Encoded, count: int, pad: int, seed: int) -> Update:
    """Return a client's scores, the mean over ``count`` of its documents drawn from ``seed`` (or all), in place of an update."""
    began = time.perf_counter()
    drawn = order(len(documents), derive(seed, "mask"))[:count]
    weights = [net.get_parameter(slot.name).requires_grad_() for slot in scores.slots]
    sums = [torch.zeros_like(weight) for weight in weights]
    total = 0.0
    net.eval()  # dropout would add noise
    with fast(net):
        for batch in batches(documents, 1, pad, drawn):
            loss = net(**{name: tensor.to(weights[0].device) for name, tensor in batch.items()}).loss
            for squares, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    squares.addcmul_(gradient, gradient)
            total += loss.item()
    fisher_M = torch.cat([squares.reshape(-1) for squares in sums]) / len(drawn)
    return Update(fisher_M, len(drawn), total / len(drawn), time.perf_counter() - began)
