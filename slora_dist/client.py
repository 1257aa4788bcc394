"""One client's local training: a fresh optimiser on the N coordinates, and the update that comes of it.

Legend: N coordinates.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slora_dist.aggregate.mean import finite
from slora_dist.config import ClientsConfig
from slora_dist.data.tokens import Encoded, batches, order, predicted
from slora_dist.errors import RunError
from slora_dist.seeding import derive
from slora_dist.sparse import training
from slora_dist.support import Support


@dataclass(frozen=True)
class Update:
    """What a client sends: ``delta_N`` = its weights minus those it was given; ``loss`` is the mean over the documents it trained on
    (the answers' tokens, of a causal language model).

    One that is left out sends zeros, and says why: ``reason`` is one of ``wire.REASONS``, ``cause`` is for the log.
    """

    delta_N: Tensor
    num_examples: int
    loss: float
    seconds: float
    reason: str = ""
    cause: str = ""


class Late(Exception):
    """A client has trained longer than ``clients.round_deadline``."""


@dataclass(frozen=True)
class Recipe:
    """How clients train in a phase: the shared settings, the learning rate of the round, and whether to compute in bfloat16.

    ``correction_n`` is added to every gradient: SCAFFOLD's c - c_k.
    """

    clients: ClientsConfig
    lr: float
    bfloat16: bool
    pad: int
    correction_n: Tensor | None = None


def attempt(net: nn.Module, support: Support, start_N: Tensor, documents: Encoded, recipe: Recipe, seed: int) -> Update:
    """Do what ``train`` does, where the failure of one client is no failure of the run: it is left out of the round."""
    return bearing(lambda: train(net, support, start_N, documents, recipe, seed), net, start_N.numel())


def bearing(work: Callable[[], Update], net: nn.Module, numel: int) -> Update:
    """Return the update of ``work``, or, for a client that is left out, ``numel`` zeros and the reason.

    Left out is a client whose work raises, gives numbers that are not finite, or exceeds its deadline.
    """
    began = time.perf_counter()
    try:
        update = work()
        if math.isfinite(update.loss) and finite(update.delta_N):
            return update
        reason, cause = "not finite", f"loss {update.loss}"
    except RunError:
        raise
    except Late as late:
        reason, cause = "late", str(late)
    except Exception as error:  # whatever a client's data or a library may raise
        reason, cause = "failed", f"{error.__class__.__name__}: {str(error).partition(chr(10))[0]}"
    net.zero_grad(set_to_none=True)  # a step that was broken off has left some; weights are written anew for every client
    return Update(torch.zeros(numel), 0, 0.0, time.perf_counter() - began, reason, cause)


def train(net: nn.Module, support: Support, start_N: Tensor, documents: Encoded, recipe: Recipe, seed: int) -> Update:
    """Train ``net`` from the values ``start_N`` on a client's documents; every random choice comes from ``seed``.

    Only the coordinates of ``support`` are written, so that no other weight moves, whatever the optimiser does (weight decay included).
    Raises ``Late`` after the step that exceeds the deadline.
    """
    began = time.perf_counter()
    device = next(net.parameters()).device
    torch.manual_seed(derive(seed, "dropout"))
    net.train()
    support.write(net, start_N)
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    with training(net, support) as leaves:
        optimizer, pull = _optimizer(leaves.tensors, recipe), _Pull(leaves.tensors, recipe)
        for batch in _local_batches(documents, recipe, seed):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                loss = net(**batch).loss
            loss.backward()
            pull.add()
            optimizer.step()
            optimizer.zero_grad()
            leaves.settle()
            _in_time(began, recipe)
            count = predicted(batch["labels"])
            total, seen = total + loss.detach() * count, seen + count
    return Update(support.read(net) - start_N, len(documents), total.item() / seen, time.perf_counter() - began)


def _in_time(began: float, recipe: Recipe) -> None:
    deadline, taken = recipe.clients.round_deadline, time.perf_counter() - began
    if deadline is not None and taken > deadline:
        raise Late(f"{taken:.3g} s, clients.round_deadline is {deadline:g} s")


class _Pull:
    """What is added to the gradients: FedProx's mu (w - w_0) (Li et al. 2020), SCAFFOLD's c - c_k (Karimireddy et al. 2020)."""

    def __init__(self, leaves: list[Tensor], recipe: Recipe) -> None:
        self._leaves, self._mu = leaves, recipe.clients.prox
        self._starts = [leaf.detach().clone() for leaf in leaves] if self._mu else []
        sizes = [leaf.numel() for leaf in leaves]
        self._corrections = torch.split(recipe.correction_n, sizes) if recipe.correction_n is not None else ()

    @torch.no_grad()
    def add(self) -> None:
        """Add it to the gradients of this step; a leaf without one has not moved and does not."""
        for leaf, start in zip(self._leaves, self._starts, strict=False):
            if leaf.grad is not None:
                leaf.grad.add_(leaf - start, alpha=self._mu)
        for leaf, correction_n in zip(self._leaves, self._corrections, strict=False):
            if leaf.grad is not None:
                leaf.grad.add_(correction_n.view(leaf.shape).to(leaf.device))


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
