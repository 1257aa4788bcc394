"""The step of a mask against the masked whole gradient. Legend: N coordinates, n kept entries of a parameter."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slora_dist import methods, sparse
from slora_dist.client import Recipe, train
from slora_dist.config import ClientsConfig, MethodConfig, SparsePhase
from slora_dist.dropout import quick
from slora_dist.masks import Pattern
from slora_dist.model import TaskModel
from slora_dist.support import Slot, Support
from tests import test_client
from tests.families import FAMILIES, build, documents

PATTERNS: tuple[Pattern, ...] = ("random", "rows", "columns", "product")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def enter(family: str, pattern: Pattern, density: float = 0.1) -> tuple[TaskModel, Support]:
    classifier, phase = build(family), SparsePhase(density=density, mask=pattern)
    classifier.net.config.pad_token_id = 0  # type: ignore[union-attr]  # GPT-2 insists on one
    coordinates = methods.support(phase, classifier, MethodConfig(), 5)
    methods.enter(phase, classifier, coordinates, 0)
    return classifier, coordinates


def backward(net: nn.Module, bfloat16: bool = False) -> None:
    """Backpropagate one batch, dropout and padding included."""
    torch.manual_seed(3)
    batch = documents()
    batch["input_ids"][0, 4:] = 0
    batch["attention_mask"][0, 4:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = net.train()(**batch).loss
    loss.backward()


def kept_gradients(net: nn.Module, coordinates: Support, bfloat16: bool = False) -> list[Tensor]:
    """The gradients of the leaves, in the order of the slots."""
    with sparse.training(net, coordinates) as leaves:
        backward(net, bfloat16)
        assert all(parameter.grad is None for parameter, _, _ in leaves.masked)
        return [torch.zeros(leaf.numel()) if leaf.grad is None else leaf.grad.reshape(-1) for leaf in leaves.tensors]


def whole_gradients(net: nn.Module, coordinates: Support, bfloat16: bool = False) -> list[Tensor]:
    """The same by plain torch: whole gradients, masked afterwards; only what is dropped must be the same."""
    net = copy.deepcopy(net)
    with quick():
        backward(net, bfloat16)
    whole = ((slot, net.get_parameter(slot.name).grad) for slot in coordinates.slots)
    return [torch.zeros(slot.count) if grad is None else slot.take(grad) for slot, grad in whole]


@every_family
@every_pattern
@pytest.mark.parametrize("density", [0.1, 0.4])
def test_it_is_the_masked_whole_gradient(family: str, pattern: Pattern, density: float) -> None:
    classifier, coordinates = enter(family, pattern, density)
    expected, found = whole_gradients(classifier.net, coordinates), kept_gradients(classifier.net, coordinates)
    names = [slot.name for slot in coordinates.slots]
    torch.testing.assert_close(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), atol=1e-6, rtol=1e-4)
    assert sum(bool(gradient_n.any()) for gradient_n in found) > 0.8 * len(found)


@every_family
@every_pattern
@pytest.mark.parametrize("density", [0.02, 0.1])
def test_under_bfloat16_it_is_as_close_to_the_exact_one_as_the_whole_gradient(family: str, pattern: Pattern, density: float) -> None:
    classifier, coordinates = enter(family, pattern, density)
    exact_N = torch.cat(whole_gradients(classifier.net, coordinates))
    usual_N, found_N = (torch.cat(way(classifier.net, coordinates, True)) for way in (whole_gradients, kept_gradients))
    assert torch.dist(found_N, exact_N) < 1.2 * torch.dist(usual_N, exact_N) < 0.1 * exact_N.norm()


@every_pattern
def test_the_net_is_as_it_was_afterwards(pattern: Pattern) -> None:
    classifier, coordinates = enter("bert", pattern)
    names, expected = list(classifier.net.state_dict()), whole_gradients(classifier.net, coordinates)
    with pytest.raises(KeyError), sparse.training(classifier.net, coordinates):
        assert list(classifier.net.state_dict()) == names
        raise KeyError
    assert not any("forward" in vars(module) for module in classifier.net.modules())
    assert all(torch.equal(*pair) for pair in zip(whole_gradients(classifier.net, coordinates), expected, strict=True))


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the shapes of all tensors that operators return, but for views of the net's own parameters."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()
        self.own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        dense = [output for output in outputs if isinstance(output, Tensor) and not output.is_sparse_csr]
        self.shapes |= {tuple(output.shape) for output in dense if output.untyped_storage().data_ptr() not in self.own}
        return result


@pytest.mark.parametrize(("pattern", "seen"), [("random", False), ("product", False), ("rows", False), ("columns", False), (None, True)])
def test_backward_makes_no_tensor_of_a_weights_size(pattern: Pattern | None, seen: bool) -> None:
    """13 documents of 7 tokens: nothing else has a weight's shape. ``None``: the whole gradient, which is seen."""
    classifier, coordinates = enter("bert", pattern or "random", 0.04 if pattern else 0.9)
    loss_of = documents(13)
    shapes = {slot.shape for slot in coordinates.slots if slot.index is not None and "encoder" in slot.name and len(slot.shape) == 2}
    shapes |= {shape[::-1] for shape in shapes} | {(50, 16)}
    with sparse.training(classifier.net, coordinates):
        loss = classifier.net(**loss_of).loss
        with Made(classifier.net) as made:
            loss.backward()
    assert bool({*made.shapes, *((*shape[:2],) for shape in made.shapes if shape[2:] == (1, 1))} & shapes) == seen


def test_the_optimiser_keeps_a_few_numbers_for_each_kept_one() -> None:
    classifier, coordinates = enter("bert", "random")
    with sparse.training(classifier.net, coordinates) as leaves:
        optimizer = torch.optim.AdamW(leaves.tensors)
        backward(classifier.net)
        optimizer.step()
    gradients = sum(leaf.grad.numel() for leaf in leaves.tensors if leaf.grad is not None)
    state = sum(entry.numel() for entries in optimizer.state.values() for entry in entries.values() if entry.dim())
    assert gradients == coordinates.numel and state == 2 * coordinates.numel


def run(classifier: TaskModel, coordinates: Support) -> Tensor:
    recipe = Recipe(ClientsConfig(batch_size=4, epochs=2), 0.01, False, 0)
    return train(classifier.net, coordinates, coordinates.reference(classifier.net), test_client.documents(9, 0), recipe, 3).delta_N


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2"])
@every_pattern
def test_training_repeats_to_the_bit_and_moves_kept_entries_only(family: str, pattern: Pattern) -> None:
    classifier, coordinates = enter(family, pattern)
    before = copy.deepcopy(classifier.net.state_dict())
    delta_N = run(classifier, coordinates)
    assert delta_N.count_nonzero() > 0.2 * coordinates.numel
    held = {name: mask == 0 for name, mask in coordinates.densify(torch.ones(coordinates.numel)).items()}
    for name, weights in classifier.net.state_dict().items():
        assert torch.equal(weights[held[name]], before[name][held[name]]) if name in held else torch.equal(weights, before[name])
    classifier.net.load_state_dict(before)
    assert torch.equal(run(classifier, coordinates), delta_N)


class Tied(nn.Module):
    """Whatever is unusual: one weight in two layers and in none, a product in place, a padded embedding, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8, padding_idx=2)
        self.twice = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 30, bias=False)
        self.decoder.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        early = self.twice.weight.cos().mean()  # comes last in the backward pass, after the layer's own gradient
        x = self.words(tokens)
        x *= 1.5
        x = self.twice(self.twice(x).tanh_())
        x += 1.0
        loss: Tensor = self.decoder(x).square().mean() + (x @ self.twice.weight).sin().mean() + early
        return loss


@pytest.fixture
def tied() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield Tied()


@every_pattern
def test_weights_that_are_tied_or_used_by_hand_get_every_gradient(tied: nn.Module, pattern: Pattern) -> None:
    slots = [Slot.masked(name, tuple(weight.shape), 0.1, pattern, 4) for name, weight in tied.named_parameters()]
    coordinates, tokens = Support(slots), torch.arange(24).view(4, 6) % 7
    tied(tokens).backward()
    expected = [slot.take(tied.get_parameter(slot.name).grad) for slot in coordinates.slots]  # type: ignore[arg-type]
    tied.zero_grad()
    with sparse.training(tied, coordinates) as leaves:
        tied(tokens).backward()
    for leaf, reference_n in zip(leaves.tensors, expected, strict=True):
        torch.testing.assert_close(leaf.grad, reference_n, atol=1e-6, rtol=1e-4)
