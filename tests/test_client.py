"""One client's training, and the round that it is part of. Legend: N coordinates."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slora_dist import methods
from slora_dist.aggregate.mean import Mean
from slora_dist.aggregate.server import Server
from slora_dist.client import Recipe, Update, train
from slora_dist.config import ClientsConfig, DensePhase, LowrankPhase, MethodConfig, ServerConfig, SparsePhase
from slora_dist.data.tokens import Encoded, batches
from slora_dist.model import TaskModel
from slora_dist.support import Support
from tests.families import build

PHASES = {"sparse": SparsePhase(density=0.1), "dense": DensePhase(), "lowrank": LowrankPhase(rank=3)}
SIZES = (5, 11, 2, 7)  # documents of the clients
PAD = 0
every_phase = pytest.mark.parametrize("kind", PHASES)


@pytest.fixture
def classifier() -> TaskModel:
    """A BERT without dropout: the identities below are about one gradient."""
    made = build("bert")
    for module in made.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


def documents(count: int, seed: int) -> Encoded:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(4, 50, size=draw.integers(3, 12)).astype(np.int32) for _ in range(count)]
    return Encoded(ids, torch.from_numpy(draw.integers(0, 3, size=count)))


def join(parts: list[Encoded]) -> Encoded:
    return Encoded([row for part in parts for row in part.ids], torch.cat([part.labels_N for part in parts]))


def enter(classifier: TaskModel, kind: str) -> tuple[Support, Tensor]:
    """(coordinates, start_N) of a phase; low-rank factors begin with a B that is not zero, so that A has a gradient."""
    phase = PHASES[kind]
    coordinates = methods.support(phase, classifier, MethodConfig(), 0)
    methods.enter(phase, classifier, coordinates, 0)
    start = methods.begin(phase, classifier, coordinates, {}, 0)
    noise_N = 0.1 * torch.randn(coordinates.numel, generator=torch.Generator().manual_seed(0))
    return coordinates, coordinates.reference(classifier.net) + start.offset_N + noise_N


def recipe(lr: float = 1.0, **settings: Any) -> Recipe:
    return Recipe(ClientsConfig(**({"batch_size": 100, "optimizer": "sgd"} | settings)), lr, False, PAD)


def centralized_step(net: nn.Module, coordinates: Support, start_N: Tensor, every: Encoded, lr: float) -> Tensor:
    """One full-batch gradient step by plain torch: the offset that it gives."""
    coordinates.write(net, start_N)
    chosen = [net.get_parameter(slot.name) for slot in coordinates.slots]
    (batch,) = batches(every, len(every), PAD)
    grads = torch.autograd.grad(net(**batch).loss, chosen)
    return -lr * torch.cat([slot.take(grad) for slot, grad in zip(coordinates.slots, grads, strict=True)])


@every_phase
def test_fedsgd_is_one_centralized_step(classifier: TaskModel, kind: str) -> None:
    """SGD, one full-batch step, all clients, mean by examples, server SGD with lr 1."""
    parts = [documents(size, seed) for seed, size in enumerate(SIZES)]
    coordinates, start_N = enter(classifier, kind)
    mean = Mean(coordinates.numel)
    for client, part in enumerate(parts):
        update = train(classifier.net, coordinates, start_N, part, recipe(lr=0.5), seed=client)
        assert update.num_examples == len(part)
        mean.count(update.num_examples)
        mean.add(0, update.delta_N, update.num_examples)
    server = Server(ServerConfig(), torch.zeros(coordinates.numel))
    server.step(mean.result())
    expected_N = centralized_step(classifier.net, coordinates, start_N, join(parts), lr=0.5)
    torch.testing.assert_close(server.offset_N, expected_N, atol=1e-6, rtol=1e-4)
    assert (expected_N != 0).float().mean() > 0.5, "the step moves most coordinates"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["sparse", "lowrank"])
def test_nothing_but_the_coordinates_moves_by_one_bit(classifier: TaskModel, kind: str, optimizer: str) -> None:
    """AdamW's decay would move every weight of a tensor if only its gradient were masked."""
    coordinates, start_N = enter(classifier, kind)
    before = copy.deepcopy(classifier.net.state_dict())
    update = train(
        classifier.net, coordinates, start_N, documents(9, 0), recipe(lr=0.01, optimizer=optimizer, weight_decay=0.3, epochs=3), seed=0
    )
    assert update.delta_N.count_nonzero() > 0.9 * coordinates.numel
    moves = {name: mask != 0 for name, mask in coordinates.densify(torch.ones(coordinates.numel)).items()}
    after = classifier.net.state_dict()
    assert list(after) == list(before)
    for name, weights in after.items():
        held = ~moves[name] if name in moves else torch.ones_like(weights, dtype=torch.bool)
        assert torch.equal(weights[held], before[name][held]), name


def reference_adamw(classifier: TaskModel, coordinates: Support, start_N: Tensor, part: Encoded, lr: float, decay: float) -> Tensor:
    """Three full-batch steps of torch's AdamW on whole parameters."""
    coordinates.write(classifier.net, start_N)
    chosen = [classifier.net.get_parameter(slot.name) for slot in coordinates.slots]
    optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=decay)
    (batch,) = batches(part, len(part), PAD)
    for _ in range(3):
        optimizer.zero_grad()
        classifier.net(**batch).loss.backward()
        optimizer.step()
    return coordinates.read(classifier.net) - start_N


@pytest.mark.parametrize("kind", ["dense", "lowrank"])
def test_several_steps_are_those_of_the_optimizer_on_whole_parameters(classifier: TaskModel, kind: str) -> None:
    part = documents(9, 0)
    coordinates, start_N = enter(classifier, kind)
    settings = recipe(lr=0.01, optimizer="adamw", weight_decay=0.1, epochs=3)
    update = train(classifier.net, coordinates, start_N, part, settings, seed=0)
    for parameter in classifier.net.parameters():
        parameter.grad = None
    expected_N = reference_adamw(classifier, coordinates, start_N, part, 0.01, 0.1)
    # rows that no document uses have a gradient of zero, where Adam's step is a sign of rounding at most
    torch.testing.assert_close(update.delta_N, expected_N, atol=3e-3, rtol=0)
    assert (update.delta_N - expected_N).abs().median() < 1e-6


def test_an_update_depends_on_its_inputs_and_nothing_before() -> None:
    """With dropout, after other clients and under another random state: the same bits, whoever plays the client."""
    classifier = build("bert")
    coordinates, start_N = enter(classifier, "sparse")

    def update(part: Encoded, seed: int) -> Update:
        return train(classifier.net, coordinates, start_N, part, recipe(lr=0.01, batch_size=4, epochs=2), seed)

    first = update(documents(9, 0), seed=3)
    torch.manual_seed(77)
    update(documents(4, 1), seed=4)
    again = update(documents(9, 0), seed=3)
    assert torch.equal(first.delta_N, again.delta_N) and first.loss == again.loss
    assert not torch.equal(first.delta_N, update(documents(9, 0), seed=5).delta_N)


@pytest.mark.parametrize(
    ("settings", "sizes"), [({"epochs": 2}, [4, 4, 2, 4, 4, 2]), ({"steps": 2}, [4, 4]), ({"steps": 5, "epochs": 9}, [4, 4, 2, 4, 4])]
)
def test_epochs_and_steps(classifier: TaskModel, settings: dict[str, int], sizes: list[int]) -> None:
    seen: list[int] = []
    classifier.net.register_forward_pre_hook(lambda net, args, kwargs: seen.append(len(kwargs["labels"])), with_kwargs=True)
    coordinates, start_N = enter(classifier, "sparse")
    update = train(classifier.net, coordinates, start_N, documents(10, 0), recipe(lr=0.01, batch_size=4, **settings), seed=0)
    assert seen == sizes and update.num_examples == 10


def test_the_loss_is_the_mean_over_the_documents_seen(classifier: TaskModel) -> None:
    part = documents(10, 0)
    coordinates, start_N = enter(classifier, "dense")
    update = train(classifier.net, coordinates, start_N, part, recipe(lr=1e-12, batch_size=4), seed=0)
    coordinates.write(classifier.net, start_N)
    (batch,) = batches(part, len(part), PAD)
    with torch.no_grad():
        assert update.loss == pytest.approx(float(classifier.net(**batch).loss), rel=1e-5)


def test_bfloat16_computes_otherwise_but_keeps_float32_weights(classifier: TaskModel) -> None:
    coordinates, start_N = enter(classifier, "dense")
    exact, coarse = (
        train(classifier.net, coordinates, start_N, documents(9, 0), Recipe(ClientsConfig(optimizer="sgd"), 0.1, bfloat16, PAD), seed=0)
        for bfloat16 in (False, True)
    )
    assert coarse.delta_N.dtype == torch.float32 and not torch.equal(exact.delta_N, coarse.delta_N)
    assert torch.nn.functional.cosine_similarity(exact.delta_N, coarse.delta_N, dim=0) > 0.99


@every_phase
def test_a_shared_layer_takes_the_sum_of_its_gradients(kind: str) -> None:
    """ALBERT runs one layer several times; its update is one."""
    classifier = build("albert")
    classifier.net.eval()
    coordinates, start_N = enter(classifier, kind)
    part = documents(6, 0)
    classifier.net.train = lambda mode=True: classifier.net  # type: ignore[method-assign]  # no dropout
    update = train(classifier.net, coordinates, start_N, part, recipe(lr=0.5), seed=0)
    expected_N = centralized_step(classifier.net, coordinates, start_N, part, lr=0.5)
    torch.testing.assert_close(update.delta_N, expected_N, atol=1e-6, rtol=1e-4)
