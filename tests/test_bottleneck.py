"""Bottleneck adapters: where they stand, what they compute, how they start."""

import pytest
import torch
from torch import Tensor, nn

from slora_dist import methods, model
from slora_dist.config import BitfitPhase, HoulsbyPhase, MethodConfig, PfeifferPhase
from slora_dist.errors import ConfigError
from slora_dist.methods import bottleneck
from slora_dist.model import TaskModel
from tests.families import FAMILIES, NAMES, SIZES, build, documents

PHASES = (HoulsbyPhase(size=5), PfeifferPhase(size=5))
LAYERS = dict.fromkeys(FAMILIES, 2) | {"albert": 1}  # that have weights of their own
every_family = pytest.mark.parametrize("family", FAMILIES)


def entered(family: str, phase: bottleneck.BottleneckPhase, seed: int = 0) -> TaskModel:
    classifier = build(family)
    methods.enter(phase, classifier, methods.support(phase, classifier, MethodConfig(), 0), seed)
    return classifier


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    said: Tensor = net.eval()(input_ids=documents()["input_ids"]).logits
    return said


@every_family
def test_houlsby_has_two_a_layer_and_pfeiffer_one(family: str) -> None:
    houlsby, pfeiffer = (bottleneck.places(phase, build(family)) for phase in PHASES)
    assert len(houlsby) == 2 * LAYERS[family] and len(pfeiffer) == LAYERS[family]
    assert set(houlsby.values()) == set(pfeiffer.values()) == {16}


@every_family
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.kind)
def test_it_starts_near_the_identity_and_is_the_identity_when_up_is_zero(family: str, phase: bottleneck.BottleneckPhase) -> None:
    classifier, plain = entered(family, phase), logits(build(family).net)
    torch.testing.assert_close(logits(classifier.net), plain, atol=1e-3, rtol=1e-2)
    for name, weight in classifier.net.named_parameters():
        if ".adapter.up." in name:
            nn.init.zeros_(weight)
    assert torch.equal(logits(classifier.net), plain)


@torch.no_grad()
def test_they_compute_what_the_papers_draw() -> None:
    """The feed-forward part's end in BERT, with x what came into the part and h what its last projection gives."""
    hidden, x = torch.randn(2, 3, 24), torch.randn(2, 3, 16)
    for phase in PHASES:
        classifier = entered("bert", phase)
        for name, weight in classifier.net.named_parameters():
            if ".adapter." in name:
                weight.normal_(std=0.5)
        end = classifier.net.eval().get_submodule("bert.encoder.layer.0.output")
        dense, norm = (getattr(module, "base_layer", module) for module in (end.dense, end.LayerNorm))
        adapter = end.dense.adapter if phase.kind == "houlsby" else end.LayerNorm.adapter  # type: ignore[union-attr]
        h = dense(hidden)
        wanted = norm(x + h + adapter(h)) if phase.kind == "houlsby" else norm(x + h + adapter(norm(x + h)))
        torch.testing.assert_close(end(hidden, x), wanted)
        act = nn.GELU() if phase.kind == "houlsby" else nn.ReLU()
        torch.testing.assert_close(adapter(h), adapter.up(act(adapter.down(h))))


def test_the_start_is_the_seeds() -> None:
    """So that it needs no message; every adapter has its own."""
    one, same, other = (dict(entered("bert", PHASES[0], seed).net.named_parameters()) for seed in (1, 1, 2))
    drawn = [name for name in one if name.endswith((".adapter.down.weight", ".adapter.up.weight"))]
    assert len(drawn) == 8 and len({one[name].sum().item() for name in drawn}) == 8
    for name in drawn:
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
        assert 0.005 < one[name].std() < 0.015 and one[name].abs().max() <= 0.02


@every_family
def test_houlsby_trains_every_norm_if_asked_to(family: str) -> None:
    classifier = build(family)
    norms = {
        f"{at}.{leaf}" for at, module in classifier.net.named_modules() if model.is_norm(module) for leaf, _ in module.named_parameters()
    }
    for asked in (True, False):
        slots = bottleneck.slots(HoulsbyPhase(norms=asked), classifier)
        assert {slot.name for slot in slots if slot.kind == "norm"} == (norms if asked else set())


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.kind)
def test_a_family_without_known_places_is_refused(phase: bottleneck.BottleneckPhase) -> None:
    mpnet = model.load(model.ModelConfig(config=SIZES | {"model_type": "mpnet"}), NAMES, 0)
    with pytest.raises(ConfigError, match="no place for an adapter in a model of type mpnet"):
        methods.support(phase, mpnet, MethodConfig(), 0)


@every_family
def test_bitfit_trains_every_bias(family: str) -> None:
    classifier = build(family)
    head = set(model.head_parameters(classifier))
    biases = {name for name, _ in classifier.net.named_parameters() if name.endswith(".bias") and name not in head}
    if family == "llama":
        with pytest.raises(ConfigError, match="no biases"):
            methods.support(BitfitPhase(), classifier, MethodConfig(), 0)
        return
    slots = methods.support(BitfitPhase(), classifier, MethodConfig(), 0).slots
    assert biases and {slot.name for slot in slots if slot.kind == "bias"} == biases
