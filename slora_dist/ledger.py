"""What every collective cost, on every rank: one line each, from which all reported bytes are summed.

``payload_bytes`` is what the clients that a rank plays sent or received: summed over all ranks and rounds it is what the federation costs,
whatever the number of ranks. ``transport_bytes`` is what this rank handed to the transport or took from it: nothing in a world of one, and
one copy of a broadcast for a rank that plays several clients. Headers, fingerprints and the like have the direction ``control``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Direction = Literal["up", "down", "control"]
Row = dict[str, Any]
BROKEN = "broken"  # the kind of what travelled in a round that was broken off


@dataclass(frozen=True)
class Label:
    """What a message is: where in the run, which way, and its bytes by kind."""

    phase: str
    round: int
    direction: Direction
    by_kind: dict[str, int]


@dataclass(frozen=True)
class Timing:
    """When a collective began on this rank (its own monotonic clock) and the seconds it spent inside the transport.

    Of a gather also the moments from which ``settle`` tells waiting from moving: on a sender the instants at which its messages were
    ready, on rank 0 for each message the instant of its arrival and the seconds spent outside the transport by then, and who sent it.
    """

    began: float
    seconds: float
    ready: Sequence[float] = ()
    arrived: Sequence[tuple[float, float]] = ()
    senders: Sequence[int] = ()


@dataclass(frozen=True)
class Entry:
    """One collective on one rank, not yet compared with the other ranks."""

    label: Label
    op: str
    clients: int
    transport_bytes: int
    timing: Timing
    varying: dict[str, int] = field(default_factory=dict)  # bytes of all its messages by kind, where each has its own size


@dataclass
class Ledger:
    """The entries that this rank has not handed over yet."""

    rank: int
    entries: list[Entry] = field(default_factory=list)
    broken: list[Entry] = field(default_factory=list)  # of rounds that were broken off

    def add(self, label: Label, op: str, clients: int, transport_bytes: int, timing: Timing, varying: dict[str, int] | None = None) -> None:
        """Note one collective in which this rank played ``clients`` clients."""
        self.entries.append(Entry(label, op, clients, transport_bytes, timing, varying or {}))

    def break_off(self) -> None:
        """Turn what was noted since the last ``take`` into bytes of collectives that came to nothing: their round is played again."""
        self.broken += map(broken_off, self.entries)
        self.entries = []

    def take(self) -> list[Entry]:
        """Return the entries since the last call, and forget them."""
        entries, self.entries = self.entries, []
        return entries


def broken_off(entry: Entry) -> Entry:
    """Return the entry of a collective that came to nothing: its bytes, whatever they were."""
    label = Label(entry.label.phase, entry.label.round, "control", {BROKEN: sum(entry.label.by_kind.values())})
    varying = {BROKEN: sum(payload(entry).values())} if entry.varying else {}
    return replace(entry, label=label, timing=Timing(entry.timing.began, entry.timing.seconds), varying=varying)


def payload(entry: Entry) -> dict[str, int]:
    """Return the bytes of an entry's messages by kind, of all clients that this rank played in it."""
    return {kind: count * entry.clients for kind, count in entry.label.by_kind.items()} | entry.varying


def line(rank: int, entry: Entry, began: float, wait: float) -> Row:
    """Return the line of the ledger for an entry: ``kind`` joins the kinds in the message, ``bytes_by_kind`` splits the payload.

    ``began`` is Unix time on rank 0's clock; ``wait`` is the part of ``seconds`` before the slowest rank that contributes was ready.
    """
    by_kind = payload(entry)
    return {
        "rank": rank,
        "round": entry.label.round,
        "phase": entry.label.phase,
        "op": entry.op,
        "direction": entry.label.direction,
        "kind": "+".join(entry.label.by_kind),
        "payload_bytes": sum(by_kind.values()),
        "bytes_by_kind": by_kind,
        "clients": entry.clients,
        "transport_bytes": entry.transport_bytes,
        "began": round(began, 6),
        "seconds": round(entry.timing.seconds, 6),
        "wait_seconds": round(wait, 6),
    }


def totals(lines: Iterable[Row]) -> Row:
    """Sum the payload of ledger lines: ``{up, down, control, by_phase: {phase: {up, down}}, by_kind: {direction: {kind: bytes}}}``."""
    sums: Row = {"up": 0, "down": 0, "control": 0, "by_phase": {}, "by_kind": {"up": {}, "down": {}}}
    for entry in lines:
        direction = entry["direction"]
        sums[direction] += entry["payload_bytes"]
        if direction != "control":
            phase = sums["by_phase"].setdefault(entry["phase"], {"up": 0, "down": 0})
            phase[direction] += entry["payload_bytes"]
            kinds = sums["by_kind"][direction]
            for kind, count in entry["bytes_by_kind"].items():
                kinds[kind] = kinds.get(kind, 0) + count
    return sums
