"""What a run will cost, from shapes alone: nothing is started, no weight is read.

The same accounts as the ledger's: payload of the clients, summed over all rounds, with the messages of the wire codec itself.
"""

from collections.abc import Sequence
from typing import Any

from slora_dist import methods
from slora_dist.config import Config, DensePhase
from slora_dist.ledger import Direction
from slora_dist.model import Classifier
from slora_dist.support import Support
from slora_dist.wire import HEADER_BYTES, Wires


def plan(config: Config, classifier: Classifier, mbit: Sequence[float]) -> dict[str, Any]:
    """Return the plan of a run: per phase the trainable parameters and the bytes of a message, and the sums over all rounds and clients.

    ``minutes`` are those of one client that takes part in every round, on a link of each of ``mbit`` Mbit/s in both directions.
    """
    phases, previous = [], None
    parameters = sum(parameter.numel() for parameter in classifier.net.parameters())
    for name, phase in zip(methods.names(config.method), config.method.resolved(), strict=True):
        coordinates = methods.support(phase, classifier, config.method, config.run.seed)
        wires = Wires.of(coordinates, config.comm.wire)
        handover = wires.down.nbytes + previous.down.nbytes if previous and methods.keeps(phase) else 0
        phases.append(_phase(config, name, phase.rounds, coordinates, wires, handover) | {"density": coordinates.numel / parameters})
        previous = wires
    by_phase = {phase["phase"]: phase["payload_bytes"] for phase in phases}
    sums = {way: sum(entry[way] for entry in by_phase.values()) for way in ("up", "down")}
    full = full_finetuning(config, classifier)
    rounds = sum(phase["rounds"] for phase in phases)
    return {
        "parameters": parameters,
        "clients": {"count": config.clients.count, "per_round": config.sampled},
        "rounds": rounds,
        "phases": phases,
        "payload_bytes": sums | {"control": HEADER_BYTES * config.sampled * rounds, "by_phase": by_phase},
        "full_finetuning_payload_bytes": full,
        "minutes": {f"{rate:g}": _minutes(_one_client(phases), rate) for rate in mbit},
        "full_finetuning_minutes": {f"{rate:g}": _minutes(sum(full.values()) // config.sampled, rate) for rate in mbit},
    }


def full_finetuning(config: Config, classifier: Classifier) -> dict[Direction, int]:
    """Return the payload of full fine-tuning in the same rounds with the same clients and number format."""
    coordinates = methods.support(DensePhase(), classifier, config.method, config.run.seed)
    rounds = sum(phase.rounds for phase in config.method.resolved())
    wires, messages = Wires.of(coordinates, config.comm.wire), config.sampled * rounds
    return {"up": wires.up.nbytes * messages, "down": wires.down.nbytes * messages}


def _phase(config: Config, name: str, rounds: int, coordinates: Support, wires: Wires, handover: int) -> dict[str, Any]:
    up, down = (wire.nbytes * config.sampled * rounds for wire in (wires.up, wires.down))
    return {
        "phase": name,
        "rounds": rounds,
        "trainable": coordinates.numel,
        "trainable_by_kind": coordinates.counts(),
        "message_bytes": {
            "up": wires.up.nbytes,
            "down": wires.down.nbytes,
            "by_kind": {"up": wires.up.by_kind(), "down": wires.down.by_kind()},
        },
        "handover_bytes": handover,
        "payload_bytes": {"up": up, "down": down + handover * config.clients.count},
    }


def _one_client(phases: Sequence[dict[str, Any]]) -> int:
    return sum(
        (phase["message_bytes"]["up"] + phase["message_bytes"]["down"]) * phase["rounds"] + phase["handover_bytes"] for phase in phases
    )


def _minutes(nbytes: int, mbit: float) -> float:
    return nbytes * 8 / (mbit * 1e6) / 60
