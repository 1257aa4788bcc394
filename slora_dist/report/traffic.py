"""What moved: by phase, direction and kind; payload against what the transport and the kernel carried; how fast."""

from collections.abc import Iterable
from dataclasses import dataclass

from slora_dist.report.read import Line, Run


def by_kind(ledger: Iterable[Line]) -> dict[tuple[str, str, str], int]:
    """Return the payload of all clients by (phase, direction, kind), in bytes; control traffic is in the ledger's order, too."""
    sums: dict[tuple[str, str, str], int] = {}
    for line in ledger:
        for kind, nbytes in line["bytes_by_kind"].items():
            key = (line["phase"], line["direction"], kind)
            sums[key] = sums.get(key, 0) + nbytes
    return sums


@dataclass
class Moved:
    """Sums over ledger lines: bytes that ranks handed to the transport or took from it, and their seconds inside it."""

    transport_bytes: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second while data moved, or None where nothing did."""
        moving = self.seconds - self.wait_seconds
        return self.transport_bytes / moving if self.transport_bytes and moving > 0 else None


def by_op(ledger: Iterable[Line]) -> dict[tuple[str, str], Moved]:
    """Return the sums by (op, side): rank 0 is a side of its own, since every message has it at one end."""
    sums: dict[tuple[str, str], Moved] = {}
    for line in ledger:
        moved = sums.setdefault((line["op"], "other ranks" if line["rank"] else "rank 0"), Moved())
        moved.transport_bytes += line["transport_bytes"]
        moved.seconds += line["seconds"]
        moved.wait_seconds += line.get("wait_seconds", 0.0)
    return sums


@dataclass(frozen=True)
class Layers:
    """The same traffic, seen from three heights, in bytes; None where nobody counted.

    ``transport`` counts each byte once: what ranks other than 0 handed over or took, since rank 0 is the other end of all of it.
    """

    payload: int
    control: int
    transport: int
    tcp_sent: int | None
    tcp_received: int | None
    interfaces: dict[str, int]  # "host name" -> sent
    infiniband: dict[str, int]

    @property
    def overhead(self) -> float | None:
        """What TCP delivered beyond the transport's bytes, as a share of these; None where one of the two is missing.

        The kernel counts as sent what has been acknowledged: at the end of a run some of it has arrived and is not yet.
        """
        return self.tcp_received / self.transport - 1 if self.tcp_received and self.transport else None


def layers(run: Run) -> Layers:
    """Sum the run's ledger and kernel counters."""
    tcp = [line["tcp"] for line in run.counters if line.get("tcp")]
    return Layers(
        sum(line["payload_bytes"] for line in run.ledger if line["direction"] != "control"),
        sum(line["payload_bytes"] for line in run.ledger if line["direction"] == "control"),
        sum(line["transport_bytes"] for line in run.ledger if line["rank"]),
        sum(line["sent_bytes"] for line in tcp) if tcp else None,
        sum(line["received_bytes"] for line in tcp) if tcp else None,
        _ports(run.counters, "interfaces"),
        _ports(run.counters, "infiniband"),
    )


def _ports(counters: Iterable[Line], what: str) -> dict[str, int]:
    sums: dict[str, int] = {}
    for line in counters:
        for name, moved in (line.get(what) or {}).items():
            key = f"{line['host']} {name}"
            sums[key] = sums.get(key, 0) + moved["tx_bytes"]
    return {key: count for key, count in sums.items() if count}
