"""The clients of a rank in a round: each trains from what it holds, and what it keeps to itself stays with its state.

Legend: N coordinates, n those that train or travel.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slora_dist import privacy
from slora_dist.agreement import tell
from slora_dist.client import Recipe, Update, attempt
from slora_dist.ledger import Label
from slora_dist.log import say
from slora_dist.roundplan import home
from slora_dist.rounds.seat import Seat
from slora_dist.runfolder import Checkpoint
from slora_dist.seeding import derive
from slora_dist.stage import Stage
from slora_dist.support import Part
from slora_dist.topk import TopK
from slora_dist.wire import Header

State = dict[str, Tensor]


def update(seat: Seat, stage: Stage, number: int, client: int) -> tuple[Header, Tensor]:
    """Train a client, and return what it sends."""
    config, wire = seat.config, stage.exchange.up_from(number, client).wires.up
    lr = stage.phase.lr * stage.phase.lr_decay ** (number - stage.first)
    recipe = Recipe(config.clients, lr, config.model.precision == "bfloat16", seat.pad)
    state = seat.states.load(client, number) if config.keeps_state else {}
    seat.where.operation = f"training of client {client}"
    with seat.journal.span("train", stage.name, number, client):
        trained = _train(seat, stage, number, client, recipe, state)
    seat.where.operation = "upload"
    told = (trained.num_examples, trained.loss, trained.seconds)
    header = Header(client, stage.at, number, *told, wire.nbytes, reason=trained.reason)
    if trained.reason:
        say(seat.comm.rank, f"client {client} is left out of round {number}: {trained.reason} ({trained.cause})")
        return header, torch.zeros(wire.support.numel)
    sent_n = _outgoing(seat, stage, header, trained, lr, state)
    if config.keeps_state:
        seat.states.save(client, number, state)
    return header, sent_n


def recall(seat: Seat, done: int, resumed: Checkpoint | None) -> None:
    """Let this rank's clients go on from their states after the last rounds up to ``done`` in which they took part, by rank 0's records.

    A round that broke leaves states behind, and so does one that was played without a rank that comes back.
    """
    counted = [0] * seat.config.clients.count
    for record in seat.folder.played(resumed):
        for client in record["clients"]:
            counted[client] = max(counted[client], record["round"])
    if done:
        counted = tell(seat.comm, counted, Label("start", done + 1, "control", {"counted": 8 * len(counted)}))
    for client, last in enumerate(counted):
        if home(client, seat.comm.size) == seat.comm.rank:
            seat.states.rewind(client, last, done + 1)
            if last and not seat.states.has(client):
                problem = f"{seat.folder.path / 'clients'} has no state of client {client} here, which was drawn in round {last}"
                say(seat.comm.rank, f"{problem}: unless it was left out, it begins anew; the run folder must lie where all ranks see it")


def _train(seat: Seat, stage: Stage, number: int, client: int, recipe: Recipe, state: State) -> Update:
    exchange, net = stage.exchange, seat.net
    start_N, part = stage.reference_N + as_held(stage, client, stage.held_N, state).to(seat.device), exchange.trains(number)
    stage.coordinates.write(net, start_N)
    part.support.require_grad(net, stage.coordinates)
    if exchange.variates:
        own_n = state.get(_variate(stage), torch.zeros_like(stage.variate_n))
        recipe = replace(recipe, correction_n=stage.variate_n - own_n)
    documents, seed = seat.federation.client(client), derive(seat.config.run.seed, "client", number, client)
    return attempt(net, part.support, part.take(start_N), documents, recipe, seed)


def as_held(stage: Stage, client: int, offset_N: Tensor, state: State) -> Tensor:
    """Return an offset as a client has it: up to its rank, with the coordinates that it keeps to itself in their places."""
    offset_N = stage.exchange.held_by(client).only(offset_N)
    for name, part in _private(stage).items():
        if name in state:
            offset_N = part.merge(offset_N.clone(), state[name])
    return offset_N


def _outgoing(seat: Seat, stage: Stage, header: Header, trained: Update, lr: float, state: State) -> Tensor:
    """Return what a client sends of its update; what it keeps goes into ``state``."""
    message, delta_n = stage.exchange.up_from(header.round, header.client), trained.delta_N.cpu()
    delta_N = stage.exchange.trains(header.round).spread(delta_n, stage.coordinates.numel)
    for name, part in _private(stage).items():
        state[name] = state.get(name, part.take(stage.held_N)) + part.take(delta_N)
    sent_n = message.part.take(delta_N)
    if message.variates:
        change_n = -stage.variate_n - delta_n / (seat.config.steps(trained.num_examples) * lr)
        state[_variate(stage)] = state.get(_variate(stage), torch.zeros_like(change_n)) + change_n
        return torch.cat([sent_n, change_n])
    wire = message.wires.up
    if isinstance(wire, TopK) and seat.config.comm.wire.feedback:
        return _owed(wire, stage, sent_n, state, seat.config.privacy.clip)
    return sent_n


def _owed(wire: TopK, stage: Stage, delta_n: Tensor, state: State, most: float | None) -> Tensor:
    """Return an update with what the client has not sent so far, and let it keep what it will not send now either.

    The update is clipped to ``most`` before, as it would be without top-k, and its message once more, where what is owed makes it longer:
    what that takes the client goes on owing.
    """
    own = f"residual.{stage.name}."
    name = own + "+".join(wire.support.counts())
    owed_n = (delta_n if most is None else privacy.clip(delta_n, most)) + state.get(name, 0)
    sent_n = owed_n if most is None else privacy.clip(wire.largest(owed_n), most)
    for key in [key for key in state if key.startswith("residual.") and not key.startswith(own)]:
        del state[key]
    state[name] = wire.keep(owed_n, sent_n)
    return sent_n


def _private(stage: Stage) -> dict[str, Part]:
    """Return the coordinates that every client keeps to itself, by the names of their states; the head's outlives the phase."""
    return {f"kept.{'head' if kind == 'head' else f'{stage.name}.{kind}'}": part for kind, part in stage.exchange.private.items()}


def _variate(stage: Stage) -> str:
    return f"variate.{stage.name}"
