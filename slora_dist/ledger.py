"""What every collective cost, on every rank: one line each, from which all reported bytes are summed.

``payload_bytes`` is what the clients that a rank plays sent or received: summed over all ranks and rounds it is what the federation costs,
whatever the number of ranks. ``transport_bytes`` is what this rank handed to the transport or took from it: nothing in a world of one, and
one copy of a broadcast for a rank that plays several clients. Headers, fingerprints and the like have the direction ``control``.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["up", "down", "control"]


@dataclass(frozen=True)
class Label:
    """What a message is: where in the run, which way, and its bytes by kind."""

    phase: str
    round: int
    direction: Direction
    by_kind: dict[str, int]


@dataclass(frozen=True)
class Line:
    """One collective on one rank: ``kind`` joins the kinds in the message, ``bytes_by_kind`` splits the payload, seconds are wall time."""

    rank: int
    round: int
    phase: str
    op: str
    direction: Direction
    kind: str
    payload_bytes: int
    bytes_by_kind: dict[str, int]
    clients: int
    transport_bytes: int
    seconds: float


class Ledger:
    """The lines that this rank has not handed over yet."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._lines: list[Line] = []

    def add(self, label: Label, op: str, clients: int, transport_bytes: int, seconds: float) -> None:
        """Note one collective in which this rank played ``clients`` clients."""
        by_kind = {kind: count * clients for kind, count in label.by_kind.items()}
        kind, payload = "+".join(label.by_kind), sum(by_kind.values())
        where = (self.rank, label.round, label.phase, op, label.direction)
        self._lines.append(Line(*where, kind, payload, by_kind, clients, transport_bytes, round(seconds, 6)))

    def take(self) -> str:
        """Return the lines since the last call as JSONL, and forget them."""
        text = "".join(json.dumps(asdict(line)) + "\n" for line in self._lines)
        self._lines.clear()
        return text


def totals(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum the payload of ledger lines: ``{up, down, control, by_phase: {phase: {up, down}}, by_kind: {direction: {kind: bytes}}}``."""
    sums: dict[str, Any] = {"up": 0, "down": 0, "control": 0, "by_phase": {}, "by_kind": {"up": {}, "down": {}}}
    for line in lines:
        direction = line["direction"]
        sums[direction] += line["payload_bytes"]
        if direction != "control":
            phase = sums["by_phase"].setdefault(line["phase"], {"up": 0, "down": 0})
            phase[direction] += line["payload_bytes"]
            kinds = sums["by_kind"][direction]
            for kind, count in line["bytes_by_kind"].items():
                kinds[kind] = kinds.get(kind, 0) + count
    return sums
