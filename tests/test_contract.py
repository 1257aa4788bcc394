"""What every method keeps to, on every family of models and over every form of the wire. A new method is a row of ``METHODS``.

Legend: N coordinates, B bytes.
"""

import json
from math import prod
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from slora_dist import adapters, masks, methods
from slora_dist.client import Recipe, train
from slora_dist.config import ClientsConfig, Indices, MethodConfig, ModelConfig, Values
from slora_dist.data.tokens import Encoded, word_tokenizer
from slora_dist.errors import ConfigError, RunError
from slora_dist.export import Result, export, write
from slora_dist.model import TaskModel, load
from slora_dist.support import Support
from slora_dist.svd import Factors
from slora_dist.wire import Wire
from tests.families import FAMILIES, NAMES, build, documents

SPARSE = {"density": 0.1, "lr": 1e-2}
METHODS: dict[str, dict[str, Any]] = {
    "fft": {"name": "fft"},
    "sft": {"name": "sft", "sparse": SPARSE},
    "sft, rows": {"name": "sft", "sparse": SPARSE | {"mask": "rows"}},
    "sft, columns": {"name": "sft", "sparse": SPARSE | {"mask": "columns"}},
    "sft, product": {"name": "sft", "sparse": SPARSE | {"mask": "product"}},
    "sft, magnitude": {"name": "sft", "sparse": SPARSE | {"mask": "magnitude"}},
    "sft, gradient": {"name": "sft", "sparse": SPARSE | {"mask": "gradient"}},
    "sft, magnitude of targets": {"name": "sft", "sparse": SPARSE | {"mask": "magnitude", "scope": "targets"}},
    "lora": {"name": "lora", "lowrank": {"rank": 3, "alpha": 6.0}},
    "lora, attention": {"name": "lora", "lowrank": {"rank": 3, "targets": "attention"}},
    "slora": {"name": "slora", "sparse": SPARSE, "lowrank": {"rank": 3, "alpha": 6.0}},
    "slora, completion": {"name": "slora", "sparse": SPARSE, "lowrank": {"rank": 3, "init": "completion"}},
    "lora, pissa": {"name": "lora", "lowrank": {"rank": 3, "alpha": 6.0, "init": "pissa"}},
    "primed_fft": {"name": "primed_fft", "lowrank": {"rank": 3, "split": "sqrt"}},
    "bitfit": {"name": "bitfit"},
    "head": {"name": "head"},
    "houlsby": {"name": "houlsby", "houlsby": {"size": 5}},
    "houlsby, norms frozen": {"name": "houlsby", "houlsby": {"size": 5, "norms": False, "activation": "tanh"}},
    "pfeiffer": {"name": "pfeiffer", "pfeiffer": {"size": 5}},
    "head, then houlsby": {"name": "custom", "phases": [{"kind": "head"}, {"kind": "houlsby", "size": 5}]},
    "head, then sft": {"name": "custom", "phases": [{"kind": "head"}, {"kind": "sparse", "mask": "magnitude", "lr": 1e-2}]},
}
VARIANTS = [name for name in METHODS if ", " in name]  # whose code does not ask for the family: two of them will do
PAIRS = [
    (family, name)
    for name in METHODS
    for family in (("bert", "gpt2") if name in VARIANTS else FAMILIES)
    if (family, name) != ("llama", "bitfit")  # which has no biases
]
ERRORS = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 254, "int4": 1 / 14}  # at most, of the largest value
WIRES = [(values, indices) for values in get_args(Values) for indices in get_args(Indices)]
SEED, WORDS = 4, 46


class Entered:
    """A classifier in the last phase of a method, whose earlier phases have learned something, and that phase's start."""

    def __init__(self, family: str, name: str, classifier: TaskModel | None = None) -> None:
        self.classifier, method = classifier or build(family), MethodConfig.model_validate(METHODS[name])
        self.net, (*earlier, self.phase) = self.classifier.net, method.resolved()
        self.before = values(self.net)
        delta: dict[str, Tensor] = {}
        found: dict[str, Factors] = {}
        for phase in earlier:
            coordinates = methods.support(phase, self.classifier, method, SEED)
            delta = methods.learned(phase, self.classifier, coordinates, noise(coordinates.numel, 0.1))
            found = methods.factored(self.phase, self.classifier, delta, coordinates)
        self.coordinates = methods.support(self.phase, self.classifier, method, SEED, chosen(self.classifier, method))
        methods.enter(self.phase, self.classifier, self.coordinates, SEED)
        self.reduced = methods.reduce_base(self.phase, self.classifier)
        self.reference_N = self.coordinates.reference(self.net)
        self.offset_N = methods.begin(self.phase, self.classifier, self.coordinates, delta, SEED, {**found, **self.reduced}).offset_N


def chosen(classifier: TaskModel, method: MethodConfig) -> dict[str, Tensor]:
    """Masks as statistics of clients might choose them."""
    shapes = {name: weight.shape for name, weight in classifier.net.named_parameters()}
    return {name: masks.largest(noise(prod(shape)), masks.kept(prod(shape), method.sparse.density)) for name, shape in shapes.items()}


def noise(count: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(count))


def values(net: nn.Module) -> dict[str, Tensor]:
    """Every weight, by the name that it has without adapters."""
    return {name.replace(".base_layer.", "."): weight.detach().clone() for name, weight in net.named_parameters()}


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    net.eval()
    batch = documents()
    said: Tensor = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return said


def some_documents() -> Encoded:
    draw = np.random.default_rng(3)
    return Encoded([draw.integers(4, 50, size=7).astype(np.int32) for _ in range(12)], torch.arange(12) % 3)


every_pair = pytest.mark.parametrize(("family", "name"), PAIRS, ids=lambda text: text.replace(", ", "-"))


@every_pair
def test_the_support_is_exactly_what_trains_and_nothing_else_moves(family: str, name: str) -> None:
    """Trainables, write after read, and training by AdamW with weight decay, from the phase's start."""
    entered = Entered(family, name)
    net, coordinates = entered.net, entered.coordinates
    trains = {of: weight.numel() for of, weight in net.named_parameters() if weight.requires_grad}
    assert trains == {slot.name: prod(slot.shape) for slot in coordinates.slots}

    held = values(net)
    coordinates.write(net, coordinates.read(net))
    assert equal(values(net), held)
    anything_N = noise(coordinates.numel)
    coordinates.write(net, anything_N)
    assert torch.equal(coordinates.read(net), anything_N)

    recipe = Recipe(ClientsConfig(batch_size=4, epochs=2, optimizer="adamw", weight_decay=0.1), 1e-2, False, 0)
    start_N = entered.reference_N + entered.offset_N
    update = train(net, coordinates, start_N, some_documents(), recipe, SEED)
    assert float(update.delta_N.abs().max()) > 0
    frozen = frozen_entries(net, coordinates)
    assert all(torch.equal(weight[frozen[of]], held[of][frozen[of]]) for of, weight in values(net).items())


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return list(some) == list(others) and all(torch.equal(weight, others[of]) for of, weight in some.items())


def frozen_entries(net: nn.Module, coordinates: Support) -> dict[str, Tensor]:
    """Which entries of each weight no coordinate is."""
    frozen = {of: torch.ones(weight.shape, dtype=torch.bool) for of, weight in values(net).items()}
    for slot in coordinates.slots:
        slot.put(frozen[slot.name], torch.zeros(slot.count, dtype=torch.bool))
    return frozen


@pytest.mark.parametrize(("values", "indices"), WIRES)
@pytest.mark.parametrize("name", METHODS)
def test_every_form_of_the_wire_carries_it(name: str, values: Values, indices: Indices) -> None:
    """Messages have the size that is accounted for; what they say is said again bit for bit; positions that differ are refused."""
    coordinates = Entered("bert", name).coordinates
    codec = Wire(coordinates, values, indices)
    offset_N = noise(coordinates.numel)
    wire_B = codec.encode(offset_N)
    assert wire_B.numel() == codec.nbytes == sum(codec.by_kind().values())
    assert set(codec.by_kind()) - {"index", "scale"} == set(coordinates.counts())
    heard_N = codec.decode(wire_B)
    assert float((heard_N - offset_N).abs().max()) <= 1.001 * ERRORS[values] * float(offset_N.abs().max())
    assert torch.equal(codec.decode(codec.encode(heard_N)), heard_N) or values not in ("float32", "bfloat16")
    if codec.index_bytes:
        wire_B[0] ^= 1
        with pytest.raises(RunError, match="positions are not those of the mask"):
            codec.decode(wire_B)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer([" ".join(f"word{at}" for at in range(WORDS))])


@every_pair
def test_what_it_leaves_is_loaded_again(family: str, name: str, tokenizer: Any, tmp_path: Path) -> None:
    """By our own loader, by plain peft where there are factors, and merged by plain transformers where that can be."""
    entered = Entered(family, name)
    judged = leave(entered, tokenizer, tmp_path / "adapter")

    export(tmp_path / "adapter", tmp_path / "copy", merge=False)
    for folder in (tmp_path / "adapter", tmp_path / "copy"):
        torch.testing.assert_close(logits(adapters.load(folder)), judged, atol=2e-5, rtol=1e-4)
    assert float((logits(adapters.base(tmp_path / "adapter")) - judged).abs().max()) > 1e-2, "the adapter does something"
    if entered.phase.kind == "lowrank":
        peft = PeftModel.from_pretrained(plain(tmp_path / "adapter" / "base"), tmp_path / "adapter")
        torch.testing.assert_close(logits(peft), judged, atol=2e-5, rtol=1e-4)
    if entered.phase.kind in ("houlsby", "pfeiffer"):
        with pytest.raises(ConfigError, match="cannot be merged"):
            export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    else:
        export(tmp_path / "adapter", tmp_path / "merged", merge=True)
        torch.testing.assert_close(logits(plain(tmp_path / "merged")), judged, atol=2e-5, rtol=1e-4)
    assert json.loads((tmp_path / "adapter" / adapters.ABOUT).read_text())["phase"] == entered.phase.model_dump()


def leave(entered: Entered, tokenizer: Any, folder: Path) -> Tensor:
    """Write what is left after some learning; returns the logits that were judged."""
    offset_N = entered.offset_N + noise(entered.coordinates.numel, 0.05)
    entered.coordinates.write(entered.net, entered.reference_N + offset_N)
    judged = logits(entered.net)
    entered.coordinates.write(entered.net, entered.reference_N)
    write(Result(entered.phase, entered.classifier, entered.coordinates, offset_N, bool(entered.reduced), tokenizer), folder)
    return judged


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_without_a_head_is_loaded_again(family: str, name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Its classifier is drawn, in the run from the seed and later by whoever loads it: what is left must not stand on it."""
    build(family).net.base_model.save_pretrained(tmp_path / "backbone")  # type: ignore[operator]
    classifier = load(ModelConfig(name=str(tmp_path / "backbone")), NAMES, SEED)
    assert classifier.source == str(tmp_path / "backbone")
    entered = Entered(family, name, classifier)
    judged = leave(entered, tokenizer, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "base").exists() == bool(entered.reduced)
    for _ in range(2):
        torch.testing.assert_close(logits(adapters.load(tmp_path / "adapter")), judged, atol=2e-5, rtol=1e-4)
    if entered.phase.kind not in ("houlsby", "pfeiffer"):
        export(tmp_path / "adapter", tmp_path / "merged", merge=True)
        torch.testing.assert_close(logits(plain(tmp_path / "merged")), judged, atol=2e-5, rtol=1e-4)


def plain(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)
