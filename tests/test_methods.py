"""Phases as choices of coordinates, over six families of models. Legend: N coordinates, O/I out/in features, R rank."""

import math

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from slora_dist import methods, model
from slora_dist.completion import complete
from slora_dist.config import DensePhase, HeadPhase, LowrankPhase, MethodConfig, SparsePhase
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel
from slora_dist.support import Support
from tests.families import FAMILIES, build, build_causal, documents

every_family = pytest.mark.parametrize("family", FAMILIES)
SPARSE, DENSE = SparsePhase(density=0.1), DensePhase()
LOWRANK = LowrankPhase(rank=3, ranks={}, alpha=6.0)
SEED = 4


def support(phase: methods.AnyPhase, classifier: TaskModel, method: MethodConfig | None = None) -> Support:
    return methods.support(phase, classifier, method or MethodConfig(), SEED)


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def logits(net: nn.Module) -> Tensor:
    net.eval()
    batch = documents()
    with torch.no_grad():
        result: Tensor = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return result


def test_names_number_what_comes_again() -> None:
    kinds = [{"kind": "sparse"}, {"kind": "lowrank"}, {"kind": "dense"}, {"kind": "lowrank"}, {"kind": "lowrank"}]
    assert methods.names(MethodConfig(name="custom", phases=kinds)) == ("sparse", "lowrank", "dense", "lowrank-2", "lowrank-3")
    assert methods.names(MethodConfig(name="primed_fft")) == ("dense", "lowrank")


@every_family
def test_a_dense_phase_moves_every_parameter_once(family: str) -> None:
    classifier = build(family)
    coordinates = support(DENSE, classifier)
    assert sorted(slot.name for slot in coordinates.slots) == sorted(name for name, _ in classifier.net.named_parameters())
    assert coordinates.numel == sum(parameter.numel() for parameter in classifier.net.parameters())


@every_family
def test_a_sparse_phase_moves_its_share_of_every_tensor_and_the_whole_head(family: str) -> None:
    classifier = build(family)
    head = set(model.head_parameters(classifier))
    counts = {slot.name: slot.count for slot in support(SPARSE, classifier).slots}
    for name, parameter in classifier.net.named_parameters():
        assert counts.get(name, 0) == (parameter.numel() if name in head else round(0.1 * parameter.numel()))


@every_family
def test_a_sparse_phase_can_keep_to_the_targets(family: str) -> None:
    classifier, method = build(family), MethodConfig(lowrank=LowrankPhase(rank=2, targets="attention"))
    masked = {slot.name for slot in support(SparsePhase(scope="targets"), classifier, method).slots if slot.kind == "value"}
    assert masked == {f"{layer}.weight" for layer in model.ranks(classifier, method.lowrank)}


def test_a_mask_of_the_targets_asks_for_no_rank() -> None:
    classifier, method = build("bert"), MethodConfig(lowrank=LowrankPhase(rank=10_000))
    assert support(SparsePhase(scope="targets"), classifier, method).numel
    with pytest.raises(ConfigError, match=r"^method\.lowrank\.rank: "):
        support(method.lowrank, classifier, method)


@pytest.mark.parametrize(("phase", "setting"), [(HeadPhase(), "model.head"), (SparsePhase(density=1e-9), "method.sparse.density")])
def test_a_phase_that_would_train_nothing_is_refused(phase: methods.AnyPhase, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: the {phase.kind} phase has nothing to train"):
        support(phase, build_causal("llama"))


@every_family
@pytest.mark.parametrize("phase", [SPARSE, DENSE, LOWRANK], ids=lambda phase: phase.kind)
def test_coordinates_are_exactly_what_trains(family: str, phase: methods.AnyPhase) -> None:
    classifier = build(family)
    coordinates = support(phase, classifier)
    methods.enter(phase, classifier, coordinates, SEED)
    trains = {name: parameter.numel() for name, parameter in classifier.net.named_parameters() if parameter.requires_grad}
    assert trains == {slot.name: math.prod(slot.shape) for slot in coordinates.slots}
    if phase.kind == "lowrank":  # whole parameters: their number is the count that peft would print
        assert coordinates.numel == sum(trains.values())


@every_family
def test_a_shell_gives_the_same_coordinates(family: str) -> None:
    classifier = build(family)
    shell = model.shell(methods_config(family), ("art", "sport", "war"))
    for phase in (SPARSE, DENSE, LOWRANK):
        assert support(phase, shell).slots == support(phase, classifier).slots


def methods_config(family: str) -> model.ModelConfig:
    return model.ModelConfig(config=FAMILIES[family])


def test_masks_follow_seed_and_name_only() -> None:
    classifier = build("bert")
    one, same = support(SPARSE, classifier), support(SPARSE, build("bert", seed=9))
    assert one.slots == same.slots
    other = methods.support(SPARSE, classifier, MethodConfig(), SEED + 1)
    twin = [slot for slot in one.slots if slot.name.endswith("query.weight")]
    assert not torch.equal(twin[0].index, twin[1].index), "layers of one shape have masks of their own"  # type: ignore[arg-type]
    assert not torch.equal(one.slots[0].index, other.slots[0].index)  # type: ignore[arg-type]


@every_family
def test_adapters_come_and_go_without_a_trace(family: str) -> None:
    classifier = build(family)
    before, said = parameters(classifier.net), logits(classifier.net)
    for phase in (LOWRANK, LowrankPhase(rank=2, targets="attention"), SPARSE):
        methods.enter(phase, classifier, support(phase, classifier), SEED)
    after = parameters(classifier.net)
    assert list(after) == list(before) and all(torch.equal(after[name], weights) for name, weights in before.items())
    assert torch.equal(logits(classifier.net), said)
    assert not hasattr(classifier.net, "peft_config")


@every_family
def test_lora_alone_starts_where_the_model_is(family: str) -> None:
    """A random within +-1/sqrt(I), B zero: the forward pass is the base's, and the gradient reaches B."""
    classifier = build(family)
    said = logits(classifier.net)
    coordinates = support(LOWRANK, classifier)
    methods.enter(LOWRANK, classifier, coordinates, SEED)
    start = methods.begin(LOWRANK, classifier, coordinates, {}, SEED)
    coordinates.write(classifier.net, coordinates.reference(classifier.net) + start.offset_N)
    assert torch.equal(logits(classifier.net), said) and start.shares("kept_energy") == ({}, None)
    for slot, span in coordinates.spans():
        entries = start.offset_N[span]
        if slot.kind == "factor_a":
            bound = 1 / math.sqrt(slot.shape[1])
            assert 0.8 * bound < entries.abs().max() <= bound and abs(entries.mean()) < 0.3 * bound
        else:
            assert not entries.any()
    classifier.net(**documents()).loss.backward()
    assert all(classifier.net.get_parameter(slot.name).grad.any() for slot in coordinates.slots if slot.kind == "factor_b")  # type: ignore[union-attr]


@every_family
def test_pissa_starts_where_the_model_is_with_its_largest_directions_in_the_factors(family: str) -> None:
    phase = LowrankPhase(rank=3, alpha=6.0, init="pissa")
    classifier = build(family)
    said, before = logits(classifier.net), parameters(classifier.net)
    coordinates = support(phase, classifier)
    methods.enter(phase, classifier, coordinates, SEED)
    found = methods.reduce_base(phase, classifier)
    start = methods.begin(phase, classifier, coordinates, {}, SEED, found)
    coordinates.write(classifier.net, coordinates.reference(classifier.net) + start.offset_N)
    torch.testing.assert_close(logits(classifier.net), said, atol=1e-5, rtol=1e-4)
    factors = methods.learned(phase, classifier, coordinates, start.offset_N)
    reduced = methods.base_weights(classifier, before)
    targets = {f"{layer}.weight" for layer in model.ranks(classifier, phase)}
    for name, weights in before.items():
        if name in targets:
            torch.testing.assert_close(factors[name], truncated(weights, 3), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(reduced[name], weights - factors[name], atol=1e-7, rtol=0)
        else:
            assert torch.equal(reduced[name], weights)
    classifier.net(**documents()).loss.backward()
    assert all(classifier.net.get_parameter(slot.name).grad.any() for slot in coordinates.slots)  # type: ignore[union-attr]


def test_other_starts_leave_the_base_alone() -> None:
    classifier = build("bert")
    for phase in (SPARSE, DENSE, LOWRANK, LowrankPhase(init="kaiming"), LowrankPhase(init="completion")):
        before = parameters(classifier.net)
        assert methods.reduce_base(phase, classifier) == {}
        assert all(torch.equal(weights, before[name]) for name, weights in parameters(classifier.net).items())


@every_family
@pytest.mark.parametrize("magnitude", ["step", "entries"])
def test_a_completion_is_of_the_weight_as_its_layer_multiplies_by_it(family: str, magnitude: str) -> None:
    """The mask of GPT-2's transposed weights is transposed with them."""
    phase = LowrankPhase(rank=2, alpha=6.0, init="completion", magnitude=magnitude)  # type: ignore[arg-type]
    sparse = SparsePhase(density=0.6)
    classifier = build(family)
    before = support(sparse, classifier)
    masks = {slot.name: slot.index for slot in before.slots}
    generator, delta = torch.Generator().manual_seed(3), {}
    for layer in model.ranks(classifier, phase):
        name = f"{layer}.weight"
        whole = torch.outer(*(torch.randn(side, generator=generator) for side in classifier.net.get_parameter(name).shape))
        delta[name] = torch.zeros_like(whole)
        delta[name].view(-1)[masks[name]] = whole.view(-1)[masks[name]]
    layer, found = next(iter(model.ranks(classifier, phase))), methods.factored(phase, classifier, delta, before)
    assert set(found) == set(model.ranks(classifier, phase))
    update = delta[f"{layer}.weight"]
    observed = torch.zeros(update.shape, dtype=torch.bool)
    observed.view(-1)[masks[f"{layer}.weight"]] = True
    if model.is_transposed(classifier, layer):
        update, observed = update.T, observed.T
    expected = complete(update, observed.reshape(-1).nonzero()[:, 0], 2, 3.0, magnitude=magnitude)  # type: ignore[arg-type]
    torch.testing.assert_close(found[layer].b_OR @ found[layer].a_RI, expected.b_OR @ expected.a_RI)
    assert found[layer].kept_energy > 0 and (magnitude == "step" or found[layer].observed_residual < 0.3)


def test_starting_anew_takes_nothing_over_but_the_head() -> None:
    phase, classifier = LowrankPhase(rank=3, init="kaiming"), build("bert")
    before, _, delta = primed(classifier, SPARSE)
    assert methods.factorable(phase, classifier, before) == [] and methods.factored(phase, classifier, delta, before) == {}
    coordinates = support(phase, classifier)
    start = methods.begin(phase, classifier, coordinates, delta, SEED, {})
    for slot, span in coordinates.spans():
        assert slot.kind == "factor_a" or torch.equal(start.offset_N[span].view(slot.shape), delta.get(slot.name, torch.zeros(slot.shape)))


def primed(classifier: TaskModel, first: methods.AnyPhase) -> tuple[Support, Tensor, dict[str, Tensor]]:
    """What a first phase could have learned: (coordinates, offset_N, update of each parameter)."""
    coordinates = support(first, classifier)
    offset_N = 0.3 * torch.randn(coordinates.numel, generator=torch.Generator().manual_seed(1))
    return coordinates, offset_N, methods.learned(first, classifier, coordinates, offset_N)


def truncated(update_OI: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(update_OI.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vt[:rank]).float()


@every_family
@pytest.mark.parametrize("first", [SPARSE, DENSE], ids=["slora", "primed_fft"])
@pytest.mark.parametrize("split", ["us", "sqrt"])
def test_after_the_switch_peft_computes_base_plus_truncated_update(family: str, first: methods.AnyPhase, split: str) -> None:
    """Alpha is not the rank, so that a scale which is forgotten or divided out twice shows."""
    phase = LowrankPhase(rank=3, alpha=6.0, split=split)  # type: ignore[arg-type]
    classifier, merged = build(family), build(family)
    before, _, delta = primed(classifier, first)
    coordinates = support(phase, classifier)
    methods.enter(phase, classifier, coordinates, SEED)
    start = methods.begin(phase, classifier, coordinates, delta, SEED, methods.factored(phase, classifier, delta, before))
    coordinates.write(classifier.net, coordinates.reference(classifier.net) + start.offset_N)

    layers, head = model.dense_layers(merged), model.head_parameters(merged)
    with torch.no_grad():
        for layer in layers:
            module = merged.net.get_submodule(layer)
            module.weight.add_(truncated(delta[f"{layer}.weight"], 3))  # type: ignore[operator, union-attr]
        for name in head:
            merged.net.get_parameter(name).add_(delta[name])
    torch.testing.assert_close(logits(classifier.net), logits(merged.net), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(build(family).net), logits(merged.net), atol=1e-2), "the update is large enough to be seen"

    energy = {layer: float(delta[f"{layer}.weight"].square().sum()) for layer in layers}
    kept = {layer: float(truncated(delta[f"{layer}.weight"], 3).square().sum()) for layer in layers}
    by_layer, total = start.shares("kept_energy")
    assert by_layer == pytest.approx({layer: kept[layer] / energy[layer] for layer in layers}, rel=1e-4)
    assert total == pytest.approx(sum(kept.values()) / sum(energy.values()), rel=1e-4)


@every_family
def test_what_the_factors_stand_for_is_what_peft_merges(family: str) -> None:
    classifier = build(family)
    before = parameters(classifier.net)
    by_layer = model.ranks(classifier, LOWRANK)
    coordinates = support(LOWRANK, classifier)
    offset_N = 0.3 * torch.randn(coordinates.numel, generator=torch.Generator().manual_seed(2))
    learned = methods.learned(LOWRANK, classifier, coordinates, offset_N)

    config = LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=["none"], **methods.lora_settings(LOWRANK, classifier))
    wrapped = get_peft_model(classifier.net, config)
    with torch.no_grad():
        for name, tensor in coordinates.densify(offset_N).items():
            if "lora_" in name:
                wrapped.base_model.model.get_parameter(name).copy_(tensor)
    after = parameters(wrapped.merge_and_unload())
    for layer in by_layer:
        torch.testing.assert_close(after[f"{layer}.weight"] - before[f"{layer}.weight"], learned[f"{layer}.weight"], atol=1e-5, rtol=1e-4)


def test_each_module_has_its_rank_and_its_scale() -> None:
    phase = LowrankPhase(rank=2, ranks={"pooler.dense": 5}, alpha=10.0)
    classifier = build("bert")
    methods.enter(phase, classifier, support(phase, classifier), SEED)
    layers = {name: classifier.net.get_submodule(name) for name in model.ranks(classifier, phase)}
    assert layers["bert.pooler.dense"].r["default"] == 5 and layers["bert.pooler.dense"].scaling["default"] == 2.0  # type: ignore[index, union-attr]
    others = [layer for name, layer in layers.items() if name != "bert.pooler.dense"]
    assert {(layer.r["default"], layer.scaling["default"]) for layer in others} == {(2, 5.0)}  # type: ignore[index, union-attr]


def test_a_shared_layer_is_counted_once_and_adapted_once() -> None:
    """ALBERT of two and of six layers has the same weights, so the same coordinates."""
    deep = model.load(model.ModelConfig(config=FAMILIES["albert"] | {"num_hidden_layers": 6}), ("art", "sport", "war"), 0)
    for phase in (SPARSE, DENSE, LOWRANK):
        assert support(phase, deep).slots == support(phase, build("albert")).slots


@every_family
@pytest.mark.parametrize(("residual", "remainder"), [("keep", "drop"), ("drop", "keep"), ("keep", "keep")])
def test_what_is_kept_and_the_factors_add_up_to_the_update(family: str, residual: str, remainder: str) -> None:
    phase = LowrankPhase(rank=3, alpha=6.0, targets="attention", residual=residual, remainder=remainder)  # type: ignore[arg-type]
    classifier = build(family)
    before = parameters(classifier.net)
    primer, _, delta = primed(classifier, DENSE)
    targets = {f"{layer}.weight" for layer in model.ranks(classifier, phase)}
    head = model.head_parameters(classifier)
    coordinates = support(phase, classifier)
    methods.enter(phase, classifier, coordinates, SEED)
    found = methods.factored(phase, classifier, delta, primer)
    start = methods.begin(phase, classifier, coordinates, delta, SEED, found)
    factors = methods.learned(phase, classifier, coordinates, start.offset_N)
    methods.add_to_base(classifier, methods.base_change(phase, delta, factors, head))
    methods.remove_adapters(classifier.net)
    for name, weights in parameters(classifier.net).items():
        kept = delta[name] if (residual if name in targets else remainder) == "keep" and name not in head else torch.zeros(())
        if name in targets and residual == "keep":
            kept = delta[name] - factors[name]
        torch.testing.assert_close(weights, before[name] + kept, atol=1e-6, rtol=1e-6)


def test_the_head_is_never_folded_into_the_base() -> None:
    """It goes on as coordinates; the rounding of a bfloat16 wire must not reach it by another way."""
    before, after = ({"head": torch.full((2,), value), "query": torch.ones(2)} for value in (1.0, 0.99))
    change = methods.base_change(LowrankPhase(residual="keep", remainder="keep"), before, after, ["head"])
    assert list(change) == ["query"]


def test_which_phases_keep_something() -> None:
    assert not methods.keeps(SPARSE) and not methods.keeps(LOWRANK)
    assert methods.keeps(LowrankPhase(residual="keep")) and methods.keeps(LowrankPhase(remainder="keep"))
