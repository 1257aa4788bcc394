"""How a rank enters a phase: at the start of a run, at a switch, which hands over what was learned, and when a run is resumed.

Legend: N coordinates, B bytes.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slora_dist import methods, upload
from slora_dist.aggregate.server import Server, take
from slora_dist.agreement import gather_bytes
from slora_dist.config import AnyPhase, LowrankPhase
from slora_dist.errors import ConfigError, RunError, TransportError
from slora_dist.evaluate import Score
from slora_dist.exchange import Exchange
from slora_dist.fisher import Selection, selection
from slora_dist.fixed import Fixed
from slora_dist.handover import spread
from slora_dist.ledger import Label
from slora_dist.model import head_parameters
from slora_dist.rounds.seat import Seat
from slora_dist.rounds.selection import choose, resend
from slora_dist.runfolder import Checkpoint
from slora_dist.stage import Stage, switch_record
from slora_dist.svd import Factors
from slora_dist.topk import TopK
from slora_dist.wire import Wire

Choice = Callable[[Wire | TopK | Fixed, str, int], upload.Collective]


def begin(seat: Seat, at: int, previous: Stage | None) -> Stage:
    """Begin phase ``at``: take over what ``previous`` learned, and put the base back to the weights that all ranks know."""
    seat.where.operation, began = "switch", time.perf_counter()
    learned: dict[str, Tensor] = {}
    if previous:
        offset_N = _last_offset(seat, previous, seat.phases[at])
        if offset_N is not None:
            learned = methods.learned(previous.phase, seat.classifier, previous.coordinates, offset_N)
        previous.coordinates.write(seat.net, previous.reference_N)
    stage = _enter(seat, at, lambda name, first, selection: choose(seat, at, name, first, selection), partial(upload.choose, seat.comm))
    _compare_fingerprints(seat, stage, stage.first)
    found = {**stage.found, **(_take_over(seat, previous, stage, learned) if previous else {})}
    if seat.is_root:
        start = methods.begin(stage.phase, seat.classifier, stage.coordinates, learned, seat.config.run.seed, found)
        stage.server = Server(seat.config.server, start.offset_N, stage.exchange.variates)
    if previous and methods.keeps(stage.phase):
        _fold(seat, previous, stage)
    if seat.is_root and methods.base_moves(seat.phases[:at], stage.phase):
        seat.folder.save_base(seat.base, stage.at)  # also where there was nothing to keep: whoever resumes looks for it
    if previous and seat.is_root:
        with seat.journal.span("evaluate", stage.name, stage.first):
            before, after = seat.score, seat.evaluate(stage)
        assert before
        seat.switch = switch_record(before, after, stage.phase, start)
    if previous or stage.mask_B is not None:
        seat.journal.note("switch", stage.name, stage.first, began, time.perf_counter() - began)
    return stage


def restore(seat: Seat, at: int, number: int, resumed: Checkpoint | None) -> Stage:
    """Enter phase ``at`` as it was after round ``number``; ``resumed`` is rank 0's."""
    seat.where.operation = "resume"
    if methods.base_moves(seat.phases[: at + 1]):
        _restore_base(seat, number, at, resumed)
    mask_B = resumed.tensors.get("mask") if resumed else None
    chosen: upload.Collective = resumed.values.get("collective", "gather") if resumed else "gather"
    stage = _enter(
        seat,
        at,
        lambda name, _, selection: resend(seat, name, number + 1, selection, mask_B),
        lambda _, name, __: upload.announce(seat.comm, chosen, name, number + 1),
    )
    _compare_fingerprints(seat, stage, number + 1)
    if resumed:
        stage.server = Server(seat.config.server, stage.held_N, stage.exchange.variates)
        stage.server.restore(resumed.tensors)
        if not stage.exchange.stateless:
            stage.held_N = take(resumed.tensors, "held", stage.held_N)
        seat.switch, seat.score = resumed.values["switch"], Score(**resumed.values["score"]) if resumed.values["score"] else None
    if not stage.exchange.stateless:
        wire_B = stage.held_N.view(torch.uint8)
        seat.comm.broadcast(wire_B, stage.label(number + 1, "control", {"held": wire_B.numel()}), clients=1)
        if seat.config.clients.min_clients:
            gone = _gone(seat, stage, number, resumed)
            stage.exchange = stage.exchange.among(seat.comm.size, seat.comm.members, gone)
    return stage


def _gone(seat: Seat, stage: Stage, last: int, resumed: Checkpoint | None) -> dict[int, set[int]]:
    """Return the clients that were not there in each round of a phase up to round ``last``: what a client lacks follows from them."""
    rounds = range(stage.first, last + 1)
    gone = np.zeros((len(rounds), seat.config.clients.count), dtype=np.bool_)
    for record in seat.folder.played(resumed):
        if record["round"] in rounds:
            gone[record["round"] - stage.first, record["missing"]["clients"]] = True
    wire_B = torch.from_numpy(np.packbits(gone))
    seat.comm.broadcast(wire_B, stage.label(last + 1, "control", {"absent": wire_B.numel()}), clients=1)
    told = np.unpackbits(wire_B.numpy(), count=gone.size).reshape(gone.shape)
    return {number: set(np.flatnonzero(row).tolist()) for number, row in zip(rounds, told, strict=True)}


def _enter(seat: Seat, at: int, mask: Callable[[str, int, Selection], Tensor], choice: Choice) -> Stage:
    """Enter phase ``at`` on a network that holds the base weights; ``mask`` brings the mask, from (name, first round, selection).

    ``choice`` tells from (wire, name, first round) how updates go up, where ``comm.collective`` is ``auto``.
    """
    phase, name = seat.phases[at], methods.names(seat.config.method)[at]
    first = 1 + sum(earlier.rounds for earlier in seat.phases[:at])
    mask_B, coordinates = None, methods.support(phase, seat.classifier, seat.config.method, seat.config.run.seed)
    if selected := selection(phase, coordinates):
        mask_B = mask(name, first, selected)
        coordinates = methods.support(phase, seat.classifier, seat.config.method, seat.config.run.seed, selected.read(mask_B))
    methods.enter(phase, seat.classifier, coordinates, seat.config.run.seed)
    found = methods.reduce_base(phase, seat.classifier)
    seat.net.to(seat.device)
    pairs = methods.pairs(phase, seat.classifier, coordinates)
    exchange = Exchange(seat.config, phase, first, coordinates, pairs, seat.comm.size, seat.comm.members)
    seat.where.phase = name
    collective: upload.Collective
    if seat.config.comm.collective == "auto":
        seat.where.operation = "probe"
        collective = choice(exchange.largest(first).up, name, first)
    else:
        collective = seat.config.comm.collective
    reference_N, held_N, variate_n = coordinates.reference(seat.net), torch.zeros(coordinates.numel), torch.zeros(exchange.variates)
    return Stage(at, name, phase, first, coordinates, exchange, pairs, reference_N, held_N, variate_n, None, collective, found, mask_B)


def _spreads(seat: Seat, phase: AnyPhase) -> bool:
    return seat.config.server.svd == "ranks" and seat.comm.size > 1 and isinstance(phase, LowrankPhase)


def _last_offset(seat: Seat, previous: Stage, phase: AnyPhase) -> Tensor | None:
    """Return what ``previous`` has learned on rank 0, and on all ranks where all of them will factor it."""
    offset_N = previous.server.offset_N if previous.server else None
    if _spreads(seat, phase):
        offset_N = torch.empty(previous.coordinates.numel) if offset_N is None else offset_N.contiguous()
        wire_B = offset_N.view(torch.uint8)
        name, number = methods.names(seat.config.method)[previous.at + 1], previous.first + previous.phase.rounds
        seat.comm.broadcast(wire_B, Label(name, number, "control", {"offset": wire_B.numel()}), clients=1)
    return offset_N


def _take_over(seat: Seat, previous: Stage, stage: Stage, learned: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return on rank 0 the factors of what was learned: its own work, or that of all ranks, each of which does its share."""
    factored = partial(methods.factored, stage.phase, seat.classifier, learned, previous.coordinates)
    if _spreads(seat, stage.phase):
        layers = methods.factorable(stage.phase, seat.classifier, previous.coordinates)
        pairs = {pair.layer: pair for pair in stage.pairs}
        return spread(seat.comm, layers, factored, pairs, stage.label(stage.first, "control", {"factors": 0}))
    return factored() if seat.is_root else {}


def _fold(seat: Seat, previous: Stage, stage: Stage) -> None:
    """Let the frozen base of every rank take over what the factors leave out: the two vectors travel once to every client."""
    before_N, after_N = (
        seat.send_down(
            one.exchange.whole.down,
            one.server.offset_N if one.server else None,
            stage.label(stage.first, "down", one.exchange.whole.down.by_kind()),
            seat.hosted,
        )
        for one in (previous, stage)
    )
    before = methods.learned(previous.phase, seat.classifier, previous.coordinates, before_N)
    factors = methods.learned(stage.phase, seat.classifier, stage.coordinates, after_N)
    assert isinstance(stage.phase, LowrankPhase)
    change = methods.base_change(stage.phase, before, factors, head_parameters(seat.classifier))
    methods.add_to_base(seat.classifier, change)
    if seat.is_root:
        seat.base |= methods.base_weights(seat.classifier, change)


def _restore_base(seat: Seat, number: int, at: int, resumed: Checkpoint | None) -> None:
    """Bring every rank's base to where the folds before the checkpoint have brought it: weights, since a sum of folds may round."""
    if resumed:
        earlier = seat.folder.load_base(at) if methods.base_moves(seat.phases[:at], seat.phases[at]) else {}
        later = {name.removeprefix("base."): weight for name, weight in resumed.tensors.items() if name.startswith("base.")}
        seat.base = earlier | later
    weights = {name: parameter.detach().cpu() for name, parameter in seat.net.named_parameters()}
    weights |= {name: take(seat.base, name, weights[name]) for name in seat.base if name in weights}
    wire_B = torch.cat([weight.reshape(-1) for weight in weights.values()]).view(torch.uint8)
    seat.comm.broadcast(wire_B, Label("start", number + 1, "control", {"base": wire_B.numel()}), clients=1)
    pieces = torch.split(wire_B.view(torch.float32), [weight.numel() for weight in weights.values()])
    with torch.no_grad():
        for (name, weight), piece in zip(weights.items(), pieces, strict=True):
            seat.net.get_parameter(name).copy_(piece.view(weight.shape))


def _compare_fingerprints(seat: Seat, stage: Stage, number: int) -> None:
    """Make sure that all ranks mean the same coordinates and start from the same reference."""
    reduced = methods.base_weights(seat.classifier, [f"{layer}.weight" for layer in stage.found])
    mine = stage.coordinates.fingerprint(torch.cat([stage.reference_N, *(weight.reshape(-1) for weight in reduced.values())]))
    for rank, theirs in gather_bytes(seat.comm, mine, stage.label(number, "control", {"fingerprint": len(mine)})).items():
        if theirs != mine:
            problem = f"rank {rank} has other weights or another mask in phase {stage.name}"
            refusal = ConfigError("--join", problem, "the same model, the same versions, and a processor that computes the same bits")
            if seat.group and seat.group.generations and seat.group.generations.refuse(rank, refusal):
                raise TransportError(f"rank 0: {problem}")  # the others go on without it
            raise RunError(f"{problem}: same model and versions?")
