"""How a round's updates move the global state: the server's step, what the rule makes of the factors, and what the base takes over.

Legend: N coordinates, n those that travelled up, K clients, O/I out/in features, Q columns of stacked factors.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from slora_dist import methods
from slora_dist.aggregate import rules
from slora_dist.aggregate.factors import restart
from slora_dist.aggregate.mean import finite
from slora_dist.aggregate.robust import aggregate
from slora_dist.aggregate.rules import Clients, Fold
from slora_dist.config import LowrankPhase, ServerConfig
from slora_dist.errors import RunError
from slora_dist.exchange import Message
from slora_dist.log import say
from slora_dist.rounds.seat import Seat
from slora_dist.stage import Stage
from slora_dist.upload import Received


def believe(settings: ServerConfig, received: Received) -> Received:
    """Return what was received with the aggregate of ``server.aggregate`` in the place of the mean."""
    if settings.aggregate == "mean":
        return received
    clients, _, update_Kn = received.sound()
    if len(clients) < settings.least:
        few = (
            f"{len(clients)} updates, too few for {settings.aggregate} to bear {settings.hostile} hostile ones: that takes {settings.least}"
        )
        say(0, f"round {received.headers[0].round} has {few}")
    trusted = aggregate(settings.aggregate, update_Kn, settings.hostile)
    distrusted = {clients[at]: reason for at, reason in sorted(trusted.distrusted.items())}
    return replace(received, mean_N=trusted.mean_N, distrusted=distrusted)


def step(seat: Seat, stage: Stage, number: int, received: Received) -> dict[str, Fold]:
    """Move rank 0's offset by a round's updates; returns what the base of each layer takes over.

    Raises ``RunError`` where all updates together are no finite number: each may be one and the sum too large for float32, or a rank has
    added to a sum on the way (``comm.collective: reduce``) what it should have left out.
    """
    assert stage.server
    if not finite(received.mean_N):
        way = "one of them was not, and was added on the way" if stage.collective == "reduce" else "they are too large together"
        raise RunError(f"the sum of all updates is not finite: {way}")
    part, numel = stage.exchange.sends(number), stage.coordinates.numel
    clients, weights, update_Kn = received.sound() if isinstance(stage.phase, LowrankPhase) else ([], [], [])
    # before the step: what rank 0 holds as a client may be the very vector that moves
    held_KN = (stage.exchange.held_by(client).only(stage.held_N) for client in clients)
    value_KN = [held_N + part.spread(update_n, numel) for held_N, update_n in zip(held_KN, update_Kn, strict=True)]
    stage.server.step(part.spread(received.mean_N[: part.support.numel], numel))
    if stage.exchange.variates:
        taking_part = (len(received.headers) - len(received.left_out)) / seat.config.clients.count
        stage.server.variate_n.add_(received.mean_N[part.support.numel :], alpha=taking_part)
    if not isinstance(stage.phase, LowrankPhase):
        return {}
    shares, portions = [weight / sum(weights) for weight in weights], [stage.phase.portion(client) for client in clients]
    offset_N, folds = rules.combine(stage.pairs, Clients(stage.phase, stage.server.offset_N, value_KN, shares, portions))
    if stage.exchange.behaviour.restarts:
        restart(stage.pairs, offset_N, seat.config.run.seed, number)
    stage.server.replace(offset_N)
    return folds


def fold(seat: Seat, stage: Stage, number: int, folds: dict[str, Fold]) -> int:
    """Let the frozen base of every client take over what the rule says; returns the bytes that it took."""
    if stage.exchange.behaviour.restarts:
        restart(stage.pairs, stage.held_N, seat.config.run.seed, number)
    sent = 0
    for message in stage.exchange.folds(number):
        _fold(seat, stage, number, message, folds)
        sent += message.wires.down.nbytes
    return sent


def _fold(seat: Seat, stage: Stage, number: int, message: Message, folds: dict[str, Fold]) -> None:
    wire = message.wires.down
    values_N = _laid_out(message, folds) if seat.is_root else None
    received_N = seat.send_down(wire, values_N, stage.label(number, "down", wire.by_kind()), seat.hosted)
    factors = message.part.support.densify(received_N)
    change = {
        f"{pair.layer}.weight": methods.as_stored(
            seat.classifier, pair.layer, factors[f"{pair.layer}.fold_B"] @ factors[f"{pair.layer}.fold_A"]
        )
        for pair in stage.pairs
    }
    methods.add_to_base(seat.classifier, change)
    if seat.is_root:
        seat.base |= methods.base_weights(seat.classifier, change)


def _laid_out(message: Message, folds: dict[str, Fold]) -> Tensor:
    """Return the factors as one vector, filled up with zero columns where clients were left out."""
    parts = []
    for slot in message.part.support.slots:
        layer, _, side = slot.name.rpartition(".")
        left_OQ, right_QI = folds[layer]
        factor = left_OQ if side == "fold_B" else right_QI.T
        lacking = (slot.shape[1] if side == "fold_B" else slot.shape[0]) - factor.shape[1]
        filled = functional.pad(factor, (0, lacking))
        parts.append((filled if side == "fold_B" else filled.T).reshape(-1).float())
    return torch.cat(parts)
