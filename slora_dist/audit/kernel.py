"""The ledger against what the kernel counted below the transport.

Nothing can cross a socket that is not counted there, so the counts bound the ledger from above; framing, rendezvous and keep-alives are
small, so they bound it from below, too. A process reads its counters just before it hands over its notes: the collection of a life's last
notes is not in them. Bytes sent are counted when the other end has acknowledged them, so those of the last round may not be.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from slora_dist.audit.expected import Life
from slora_dist.audit.run import Run
from slora_dist.ledger import Row

FRAMING_SHARE, FRAMING_BYTES = 0.02, 1 << 14  # of what was moved; and for each rank and round


@dataclass(frozen=True)
class Moved:
    """Bytes that the ledger says went through the sockets of each rank, at least, and through those of all ranks together."""

    sent: Counter[int]
    received: Counter[int]
    everywhere: int


def sockets(run: Run) -> Iterator[str] | None:
    """Each rank's TCP connections carried what its ledger says, and little more."""
    lives = [life for life in run.lives if life.size > 1 and run.transport(life) == "gloo"]
    counted = any(line["tcp"]["received_bytes"] for line in run.counters)
    return _sockets(run, lives) if lives and counted else None


def _sockets(run: Run, lives: list[Life]) -> Iterator[str]:
    for life in lives:
        rounds = f"counters.jsonl: rounds {life.first} to {life.last}"
        moved, settled = _moved(run, life, life.last), _moved(run, life, life.last - 1)
        counts = [line for line in run.counters if life.first <= line["round"] <= life.last]
        sent, received = (_by_rank(counts, field) for field in ("sent_bytes", "received_bytes"))
        for rank in life.members:
            if received[rank] < moved.received[rank]:
                yield f"{rounds}, rank {rank}: sockets received {received[rank]} bytes, the ledger has {moved.received[rank]}"
            if sent[rank] < settled.sent[rank]:
                yield f"{rounds}, rank {rank}: sockets sent {sent[rank]} bytes, the ledger has {settled.sent[rank]}"
        most = round(moved.everywhere * (1 + FRAMING_SHARE)) + FRAMING_BYTES * life.size * (1 + life.last - life.first)
        if received.total() > most:
            yield f"{rounds}: sockets received {received.total()} bytes in all, the ledger with framing allows {most}"


def _by_rank(counts: list[Row], field: str) -> Counter[int]:
    sums: Counter[int] = Counter()
    for line in counts:
        sums[line["rank"]] += line["tcp"][field]
    return sums


def _moved(run: Run, life: Life, last: int) -> Moved:
    """Sum a life's lines up to round ``last``. Who passes a broadcast or a sum on to whom is open; everybody takes or gives it once."""
    sent, received = Counter[int](), Counter[int]()
    everywhere = 0
    for line in run.ledger:
        late = line["kind"] == "ledger" and line["round"] == life.last
        if not life.first <= line["round"] <= last or late:
            continue
        rank, nbytes = line["rank"], line["transport_bytes"]
        gives, takes = {"gather": (rank > 0, rank == 0), "broadcast": (rank == 0, rank > 0), "reduce": (rank > 0, rank == 0)}[line["op"]]
        sent[rank] += nbytes * gives
        received[rank] += nbytes * takes
        everywhere += nbytes * (2 if line["op"] == "reduce" else takes)  # a ring passes almost twice the vector on, per rank
    return Moved(sent, received, everywhere)


def interfaces(run: Run) -> Iterator[str] | None:
    """Where every rank has a host of its own, the host's interfaces carried what the ledger says."""
    hosts = {line["rank"] for line in run.counters if line["interfaces"]}
    lives = [life for life in run.lives if life.size > 1 and hosts >= set(life.members)]
    return _interfaces(run, lives) if lives else None


def _interfaces(run: Run, lives: list[Life]) -> Iterator[str]:
    for life in lives:
        moved, counts = _moved(run, life, life.last - 1), Counter[tuple[int, str]]()
        for line in run.counters:
            if life.first <= line["round"] <= life.last:
                for interface, bytes_by_way in line["interfaces"].items():
                    for way, nbytes in bytes_by_way.items() if interface != "lo" else ():
                        counts[line["rank"], way] += nbytes
        for rank in life.members:
            for way, least in (("rx_bytes", moved.received[rank]), ("tx_bytes", moved.sent[rank])):
                if counts[rank, way] < least:
                    where = f"counters.jsonl: rounds {life.first} to {life.last}, rank {rank}"
                    yield f"{where}: interfaces have {way} {counts[rank, way]}, the ledger has {least} bytes"
