"""What a run will cost, from shapes alone: nothing is started, no weight is read.

The same accounts as the ledger's: payload of the clients, summed over all rounds, with the messages of the wire codec itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from slora_dist import methods, personal
from slora_dist.config import Config, DensePhase
from slora_dist.exchange import Exchange
from slora_dist.ledger import Direction
from slora_dist.model import TaskModel
from slora_dist.network import agreements
from slora_dist.roundplan import present
from slora_dist.wire import HEADER_BYTES, Wires


def plan(config: Config, classifier: TaskModel, mbit: Sequence[float]) -> dict[str, Any]:
    """Return the plan of a run: per phase the trainable parameters and the bytes of a message, and the sums over all rounds and clients.

    The bytes of control are those of the clients: headers, scores, and for exact sums their magnitudes and keys.
    ``minutes`` are those of one client that takes part in every round, on a link of each of ``mbit`` Mbit/s in both directions.
    """
    phases, previous = list[dict[str, Any]](), None
    parameters = sum(parameter.numel() for parameter in classifier.net.parameters())
    messages_of = exchanges(config, classifier)
    for name, exchange in messages_of.items():
        density = exchange.coordinates.numel / parameters
        phases.append(_phase(config, name, exchange, _handover(exchange, previous)) | {"density": density})
        previous = exchange
    by_phase = {phase["phase"]: phase["payload_bytes"] for phase in phases}
    sums = {way: sum(entry[way] for entry in by_phase.values()) for way in ("up", "down")}
    planned = sum(phase["rounds"] for phase in phases)
    messages = _messages(config, planned)
    full = full_finetuning(config, classifier, messages)
    one = sum(sum(ways.values()) for ways in one_client(messages_of.values()).values())
    return {
        "parameters": parameters,
        "clients": {"count": config.clients.count, "per_round": config.sampled},
        "rounds": planned,
        "phases": phases,
        "payload_bytes": sums | {"control": sum(phase["control_bytes"] for phase in phases), "by_phase": by_phase},
        "full_finetuning_payload_bytes": full,
        "minutes": {f"{rate:g}": _minutes(one, rate) for rate in mbit},
        "full_finetuning_minutes": {f"{rate:g}": _minutes(sum(full.values()) // messages * planned, rate) for rate in mbit},
    }


def exchanges(config: Config, classifier: TaskModel) -> dict[str, Exchange]:
    """Return the messages of every phase, by its name."""
    found, first = {}, 1
    for name, phase in zip(methods.names(config.method), config.method.resolved(), strict=True):
        coordinates = methods.support(phase, classifier, config.method, config.run.seed)
        found[name] = Exchange(config, phase, first, coordinates, methods.pairs(phase, classifier, coordinates))
        first += phase.rounds
    return found


def one_client(phases: Iterable[Exchange]) -> dict[int, dict[str, int]]:
    """Return for each round the bytes of a client, of the largest rank, that takes part in every one: ``{round: {up, down}}``."""
    found, previous = dict[int, dict[str, int]](), None
    for exchange in phases:
        for number, (up, down) in zip(exchange.numbers(), exchange.faithful(), strict=True):
            found[number] = {"up": up, "down": down}
        chosen, first = exchange.selection, found[exchange.first]
        first["down"] += _handover(exchange, previous) + (sum(chosen.down.values()) if chosen else 0)
        first["up"] += sum(chosen.up.values()) if chosen else 0
        previous = exchange
    return found


def _handover(exchange: Exchange, previous: Exchange | None) -> int:
    """Return the bytes that every client gets when a phase begins which folds something of the one before into the base."""
    return exchange.whole.down.nbytes + previous.whole.down.nbytes if previous and methods.keeps(exchange.phase) else 0


def full_finetuning(config: Config, classifier: TaskModel, messages: int) -> dict[Direction, int]:
    """Return the payload of full fine-tuning in the same number format, when so many ``messages`` travel up and as many down:
    one for every client of every round.
    """
    coordinates = methods.support(DensePhase(), classifier, config.method, config.run.seed)
    wire = config.comm.wire.model_copy(update={"topk": None})
    wires = Wires.of(coordinates, config.comm.model_copy(update={"wire": wire}))
    return {"up": wires.up.nbytes * messages, "down": wires.down.nbytes * messages}


def _messages(config: Config, rounds: int) -> int:
    """Return how many clients the rounds have together, as planned."""
    here = (config.clients.count - len(config.clients.away_in(number)) for number in range(1, 1 + rounds))
    return sum(min(config.sampled, count) for count in here)


def _phase(config: Config, name: str, exchange: Exchange, handover: int) -> dict[str, Any]:
    """Return a phase's row: ``message_bytes`` are those of its first round, ``client_bytes`` those of a client in all of its rounds.

    Where ranks differ, both are those of a client of the largest.
    """
    first, rounds = exchange.largest(exchange.first), exchange.numbers()
    up = [exchange.up(number) for number in rounds]
    down = [message for number in rounds for message in [*exchange.down(number), *exchange.folds(number)]]
    faithful = list(exchange.faithful())
    chosen = exchange.selection
    judging = sum(len(present(config, number, 1, (0,))) for number in rounds if personal.due(config, number))
    evaluation = {"up": personal.SCORE_BYTES * judging, "down": exchange.whole.down.nbytes * judging}
    drawn = [sum(len(message.clients) for message in messages) for messages in up]
    selected = {"up": sum(chosen.up.values()), "down": sum(chosen.down.values())} if chosen else {"up": 0, "down": 0}
    return {
        "phase": name,
        "rounds": exchange.rounds,
        "trainable": exchange.coordinates.numel,
        "trainable_by_kind": dict(exchange.coordinates.counts()),
        "message_bytes": {
            "up": first.up.nbytes,
            "down": faithful[0][1],
            "estimated": first.up.varies is not None,  # positions of top-k updates, whose codes have a size of their own
            "by_kind": {"up": first.up.by_kind(), "down": exchange.whole.down.by_kind()},
        },
        "client_bytes": {"up": sum(up for up, _ in faithful), "down": sum(down for _, down in faithful)},
        "handover_bytes": handover,
        "selection_bytes": selected,
        "evaluation_bytes": evaluation,
        "control_bytes": sum(_control(config, clients) for clients in drawn)
        + (HEADER_BYTES * drawn[0] if chosen else 0)
        + sum(evaluation.values()),
        "payload_bytes": {
            "up": sum(message.wires.up.nbytes * len(message.clients) for messages in up for message in messages)
            + selected["up"] * drawn[0],
            "down": sum(message.wires.down.nbytes * len(message.clients) for message in down)
            + (handover + selected["down"]) * config.clients.count,
        },
    }


def _control(config: Config, clients: int) -> int:
    """Return the bytes with which as many clients' uploads are told apart and, for exact sums, agreed on in a round."""
    agreed = sum(up + (down if kind == "key" else 0) for kind, (up, down) in agreements(config, clients).items())
    return clients * (HEADER_BYTES + agreed)


def _minutes(nbytes: int, mbit: float) -> float:
    return nbytes * 8 / (mbit * 1e6) / 60
