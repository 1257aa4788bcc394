"""A training step of each phase against a full fine-tuning step as one writes it by hand: torch's AdamW over all parameters.

CPU seconds of one thread, each round all contenders in turn. ``limit`` is a step of ours without any weight gradient. Ours are whole calls
of ``client.train``, so that building batches, patterns and the update counts.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.common import Row, interleave, middle, ratio
from slora_dist import methods, model
from slora_dist.client import Recipe, train
from slora_dist.config import ClientsConfig, LowrankPhase, MethodConfig, ModelConfig, SparsePhase
from slora_dist.data.tokens import Encoded, batches
from slora_dist.linear import fast

RUNS, BATCH = 9, 16
STEPS = {"MiniLM": 2, "DistilBERT": 1}  # in a round: the larger one takes as long for fewer
NAMES = tuple(f"class {at}" for at in range(20))
SHAPES = {"MiniLM": ModelConfig(name="minilm"), "DistilBERT": ModelConfig(config={"model_type": "distilbert"})}
ATTENTION = {"MiniLM": ["query", "value"], "DistilBERT": ["q_lin", "v_lin"]}
# (mask, density): targets of the two shapes in float32, target under bfloat16 autocast
SPARSE = {
    ("random", 0.01): ((0.78, 0.74), 0.95),
    ("random", 0.1): ((0.88, 0.80), 0.95),
    ("product", 0.01): ((0.72, 0.66), 0.85),
    ("product", 0.1): ((0.76, 0.70), 0.85),
}
Step = Callable[[], object]


def documents(length: int) -> Encoded:
    """Return one batch of random documents of equal length."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(1000, 30000, size=length).astype(np.int32) for _ in range(BATCH)]
    return Encoded(ids, torch.from_numpy(draw.integers(0, len(NAMES), size=BATCH)))


def by_hand(net: Any, bfloat16: bool, shape: str, length: int = 64) -> Step:
    """Return the usual loop over whatever of ``net`` requires a gradient, on documents of ``length`` tokens."""
    optimizer = torch.optim.AdamW([parameter for parameter in net.parameters() if parameter.requires_grad], lr=1e-5)
    (batch,) = batches(documents(length), BATCH, pad=0)
    net.train()

    def steps() -> None:
        for _ in range(STEPS[shape]):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = net(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def quickly(net: Any, bfloat16: bool, shape: str, length: int = 64) -> Step:
    """Return the usual loop on our linear layers."""
    steps = by_hand(net, bfloat16, shape, length)

    def fast_steps() -> None:
        with fast(net):
            steps()

    return fast_steps


def frozen(net: Any) -> Any:
    """Return ``net`` with nothing to train but the first norm, which makes the gradient of every activation necessary."""
    for name, parameter in net.requires_grad_(False).named_parameters():
        parameter.requires_grad_(name.endswith("embeddings.LayerNorm.weight"))
    return net


def ours(phase: methods.AnyPhase, shape: str, bfloat16: bool, length: int = 64) -> Step:
    """Return a client's training in a phase."""
    classifier, part = model.load(SHAPES[shape], NAMES, 0), documents(length)
    coordinates = methods.support(phase, classifier, MethodConfig(), 0)
    methods.enter(phase, classifier, coordinates, 0)
    start_N = coordinates.reference(classifier.net) + methods.begin(phase, classifier, coordinates, {}, 0).offset_N
    recipe = Recipe(ClientsConfig(batch_size=BATCH, steps=STEPS[shape]), 1e-5, bfloat16, pad=0)
    return lambda: train(classifier.net, coordinates, start_N, part, recipe, 0)


def peft(phase: LowrankPhase, shape: str) -> Step:
    """Return the usual loop on peft's model with the same layers adapted."""
    classifier = model.load(SHAPES[shape], NAMES, 0)
    layers, head = list(model.ranks(classifier, phase)), list(classifier.head)
    return by_hand(get_peft_model(classifier.net, LoraConfig(r=phase.rank, target_modules=layers, modules_to_save=head)), False, shape)


def sparse(shape: str, bfloat16: bool, length: int = 64) -> list[Row]:
    """Return the rows of the sparse phase, for one shape, precision and length."""

    def net() -> Any:
        return model.load(SHAPES[shape], NAMES, 0).net

    how = (bfloat16, shape, length)
    usual: dict[Any, Step] = {"full": by_hand(net(), *how), "fast": quickly(net(), *how), "limit": quickly(frozen(net()), *how)}
    masked = {
        (mask, density): ours(SparsePhase(mask=mask, density=density), shape, bfloat16, length)  # type: ignore[arg-type]
        for mask, density in SPARSE
    }
    seconds = interleave(usual | masked, RUNS, time.process_time)
    found = []
    for (mask, density), (by_shape, coarse) in SPARSE.items():
        taken = seconds[mask, density]  # type: ignore[index]
        target = coarse if bfloat16 else by_shape[list(SHAPES).index(shape)]
        name = f"step: {density:.0%} {mask} mask, {shape}, {'bfloat16' if bfloat16 else 'float32'}{', 128 tokens' if length == 128 else ''}"
        limit = ratio(seconds["limit"], seconds["full"])
        beside = {"of a full step on our linear layers": ratio(taken, seconds["fast"]), "seconds": middle(taken) / STEPS[shape]}
        found.append(Row(name, ratio(taken, seconds["full"]), target, limit, RUNS, "full fine-tuning step", beside))
    return found


def lowrank(shape: str) -> list[Row]:
    """Return the rows of LoRA, for one shape: against the full step, and no worse than peft."""
    phases = {"query and value": LowrankPhase(targets=ATTENTION[shape]), "all dense layers": LowrankPhase()}
    contenders = {"full": by_hand(model.load(SHAPES[shape], NAMES, 0).net, False, shape)}
    contenders["limit"] = quickly(frozen(model.load(SHAPES[shape], NAMES, 0).net), False, shape)
    for name, phase in phases.items():
        contenders |= {f"ours {name}": ours(phase, shape, False), f"peft {name}": peft(phase, shape)}
    seconds = interleave(contenders, RUNS, time.process_time)
    found = []
    for name in phases:
        mine, theirs = seconds[f"ours {name}"], seconds[f"peft {name}"]
        target, limit = ratio(theirs, seconds["full"]), ratio(seconds["limit"], seconds["full"])
        beside = {"of peft's step": ratio(mine, theirs)}
        found.append(
            Row(f"step: LoRA on {name}, {shape}", ratio(mine, seconds["full"]), target, limit, RUNS, "full fine-tuning step", beside)
        )
    return found


def rows(shape: str) -> list[Row]:
    """Return the rows of the local step, for one shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        longer = sparse(shape, False, 128) if shape == "MiniLM" else []
        return [*sparse(shape, False), *longer, *sparse(shape, True), *lowrank(shape)]
    finally:
        torch.set_num_threads(before)
