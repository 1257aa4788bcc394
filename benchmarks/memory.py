"""What a sparse step keeps beside the activations: every allocation of torch is in the profile, nothing is estimated.

Steps on MiniLM (random mask, 1 %, 16 documents of 64 tokens): ours, the same without any weight gradient, and full fine-tuning. Two things
are looked at: the peak beyond that of the step without weight gradients, in units of the kept entries; and allocations that have the
size of a masked matrix, which would be a whole gradient or a copy of a weight.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Row
from benchmarks.steps import NAMES, SHAPES, by_hand, documents, frozen, ours, quickly
from slora_dist import methods, model
from slora_dist.config import MethodConfig, SparsePhase
from slora_dist.data.tokens import batches

SMALL = 1 << 16  # entries: below this a vector may happen to have the size of a matrix
SHAPE, PHASE = "MiniLM", SparsePhase(density=0.01)
LEAST, MOST = 4, 8  # floats a kept entry: value, gradient and two moments; and what is in passing


def allocations(step: Callable[[], object]) -> list[int]:
    """Return the bytes that ``step`` took (positive) and gave back (negative), in order."""
    step()  # what is made once and kept is not part of a step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    found = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]


def peak(moved: Iterable[int]) -> int:
    """Return the most bytes that were taken at once."""
    return max(accumulate(moved))


def whole(moved: Iterable[int], sizes: set[int]) -> int:
    """Return how many allocations had one of ``sizes``."""
    return sum(count for nbytes, count in Counter(moved).items() if nbytes in sizes)


def inference() -> Callable[[], object]:
    """Return the evaluation of one batch."""
    net, (batch,) = model.load(SHAPES[SHAPE], NAMES, 0).net.eval(), batches(documents(64), 16, pad=0)
    return torch.inference_mode()(lambda: net(**batch).loss)


class _Held(torch.autograd.Function):
    """Passes a layer's output on, and holds its input until the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def keeping(net: Any) -> Any:
    """Return ``net`` with its linear layers holding their inputs, which any weight gradient needs: MKL's let go of them."""
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, given, y: _Held.apply(y, given[0].detach()))  # type: ignore[no-untyped-call]
    return net


def rows() -> list[Row]:
    """Return the rows of memory."""
    classifier = model.load(SHAPES[SHAPE], NAMES, 0)
    support = methods.support(PHASE, classifier, MethodConfig(), 0)
    matrices = [slot for slot in support.slots if slot.index is not None and len(slot.shape) > 1 and prod(slot.shape) > SMALL]
    sizes = {4 * prod(slot.shape) for slot in matrices}
    base = model.load(SHAPES[SHAPE], NAMES, 0).net
    steps = {"sparse": ours(PHASE, SHAPE, False), "limit": quickly(keeping(frozen(base)), False, SHAPE)}
    steps |= {"full": by_hand(model.load(SHAPES[SHAPE], NAMES, 0).net, False, SHAPE), "inference": inference()}
    moved = {name: allocations(step) for name, step in steps.items()}
    most, kept = {name: peak(bytes_) for name, bytes_ in moved.items()}, 4 * support.numel
    beside = {f"MB, {name}": nbytes / 1e6 for name, nbytes in most.items()}
    beside["full step, in the same unit"] = (most["full"] - most["limit"]) / kept
    whole_ones = whole(moved["sparse"], sizes) - whole(moved["limit"], sizes)
    against = "bytes of the kept entries"
    return [
        Row(
            "memory: a sparse step beyond one without weight gradients",
            (most["sparse"] - most["limit"]) / kept,
            MOST,
            LEAST,
            1,
            against,
            beside,
        ),
        Row(
            "memory: whole gradients or weight copies beyond that step", whole_ones, 0, 0, 1, "count", {"full": whole(moved["full"], sizes)}
        ),
    ]
