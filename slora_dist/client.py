"""One client's local training: a fresh optimiser on the N coordinates, and the update that comes of it.

Legend: N coordinates.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slora_dist.config import ClientsConfig
from slora_dist.data.tokens import Encoded, batches, order, predicted
from slora_dist.seeding import derive
from slora_dist.sparse import training
from slora_dist.support import Support


@dataclass(frozen=True)
class Update:
    """What a client sends: ``delta_N`` = its weights minus those it was given; ``loss`` is the mean over the documents it trained on
    (the answers' tokens, of a causal language model)."""

    delta_N: Tensor
    num_examples: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Recipe:
    """How clients train in a phase: the shared settings, the learning rate of the round, and whether to compute in bfloat16."""

    clients: ClientsConfig
    lr: float
    bfloat16: bool
    pad: int


def train(net: nn.Module, support: Support, start_N: Tensor, documents: Encoded, recipe: Recipe, seed: int) -> Update:
    """Train ``net`` from the values ``start_N`` on a client's documents; every random choice comes from ``seed``.

    Only the coordinates of ``support`` are written, so that no other weight moves, whatever the optimiser does (weight decay included).
    """
    began = time.perf_counter()
    device = next(net.parameters()).device
    torch.manual_seed(derive(seed, "dropout"))
    net.train()
    support.write(net, start_N)
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    with training(net, support) as leaves:
        optimizer = _optimizer(leaves.tensors, recipe)
        for batch in _local_batches(documents, recipe, seed):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            leaves.settle()
            count = predicted(batch["labels"])
            total, seen = total + loss.detach() * count, seen + count
    return Update(support.read(net) - start_N, len(documents), total.item() / seen, time.perf_counter() - began)


def _optimizer(leaves: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    settings = recipe.clients
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    return kind(leaves, lr=recipe.lr, weight_decay=settings.weight_decay, fused=True)


def _local_batches(documents: Encoded, recipe: Recipe, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of ``epochs`` epochs, or of ``steps`` steps over as many epochs as they take; each epoch has its own order."""
    settings = recipe.clients
    epochs = range(settings.epochs) if settings.steps is None else itertools.count()
    orders = (order(len(documents), derive(seed, "epoch", epoch)) for epoch in epochs)
    every = itertools.chain.from_iterable(batches(documents, settings.batch_size, recipe.pad, order_N) for order_N in orders)
    return itertools.islice(every, settings.steps)
