"""The ledger line by line: each by itself, against the protocol, and what one rank sent against what another received."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slora_dist.admission import ANSWER_BYTES, NONCE_BYTES
from slora_dist.audit.expected import Key, Life, Want, key
from slora_dist.audit.run import Run
from slora_dist.clock import TRIES
from slora_dist.ledger import Row

# What a start leaves under round 0: the admission of the command line's runs, an agreement, the machines, and for each machine but rank 0's
# the tries to read its clock.
_ADMISSION = tuple(
    ("start", op, "control", kind) for op, kind in (("broadcast", "challenge"), ("gather", "answer"), ("broadcast", "verdict"))
)
_AGREEMENT = tuple(("start", op, "control", kind) for kind in ("problem", "machine") for op in ("gather", "broadcast"))
_CLOCKS = tuple(("start", op, "control", "clock") for op in ("gather", "broadcast"))
_START_BYTES = {("gather", "problem"): 0, ("broadcast", "problem"): 8, ("gather", "clock"): 8, ("broadcast", "clock"): 8}
_START_BYTES |= {("broadcast", "challenge"): NONCE_BYTES, ("gather", "answer"): ANSWER_BYTES}


def arithmetic(run: Run) -> Iterator[str]:
    """Every line adds up."""
    for line in run.ledger:
        by_kind = line["bytes_by_kind"]
        if line["payload_bytes"] != sum(by_kind.values()):
            yield f"{where(line)}: payload_bytes {line['payload_bytes']}, the sum of bytes_by_kind is {sum(by_kind.values())}"
        if line["kind"] != "+".join(by_kind):
            yield f"{where(line)}: kind {line['kind']}, bytes_by_kind has {'+'.join(by_kind)}"
        if not 0 <= line["wait_seconds"] <= line["seconds"]:
            yield f"{where(line)}: wait_seconds {line['wait_seconds']} of seconds {line['seconds']}"


def gathers(run: Run) -> Iterator[str]:
    """What senders handed to the transport in a gather is what rank 0 took from it."""
    moved: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    for line in run.ledger:
        if line["op"] == "gather":
            number, rank, *rest = key(line)
            moved[number, *rest][rank > 0] += line["transport_bytes"]
    for (number, *rest), (received, sent) in moved.items():
        if received != sent:
            yield f"{name((number, 0, *rest))}: received {received} transport_bytes, the other ranks sent {sent}"


def protocol(run: Run) -> Iterator[str]:
    """Every rank has exactly the lines that the settings demand, with the figures that they demand."""
    wants: dict[Key, list[Want]] = defaultdict(list)
    for life in run.lives:
        for want in run.protocol.lines(life, _chosen(run, life)):
            wants[want.key].append(want)
    lines: dict[Key, list[Row]] = defaultdict(list)
    for line in run.ledger:
        lines[key(line)].append(line)
    for which in sorted(wants.keys() | {which for which in lines if which[0]}):
        yield from _compare(run, which, lines.get(which, []), wants.get(which, []))
    yield from _starts(run, {which: found for which, found in lines.items() if not which[0]})


def _chosen(run: Run, life: Life) -> Callable[[str], str]:
    """Return how updates of a phase were uploaded: the setting, or what ``auto`` chose, as most lines of the life say."""

    def collective(phase: str) -> str:
        if run.config.comm.collective != "auto":
            return run.config.comm.collective
        lines = (line for line in run.ledger if life.first <= line["round"] <= life.last and line["phase"] == phase)
        ops = Counter(line["op"] for line in lines if line["direction"] == "up")
        return max(ops, key=lambda op: ops[op], default="gather")

    return collective


def _compare(run: Run, which: Key, lines: Sequence[Row], wants: Sequence[Want]) -> Iterator[str]:
    needed = sum(want.needed for want in wants)
    if not needed <= len(lines) <= len(wants):
        yield _count(which, len(lines), len(wants))
        return
    for line, want in zip(lines, wants, strict=False):
        by_kind = {kind: count if count is None else count * want.clients for kind, count in want.by_kind.items()}
        payload = line["payload_bytes"] if None in by_kind.values() else sum(count or 0 for count in by_kind.values())
        transport = want.transport
        if transport is None and want.rank and (want.clients == 1 or not run.config.comm.encrypt):  # a size of the run's own is said twice
            transport = run.protocol.carried(payload + want.headers)
        figures = {"clients": want.clients, "payload_bytes": payload, "transport_bytes": transport}
        figures |= {f"bytes_by_kind.{kind}": count for kind, count in by_kind.items()}
        yield from _figures(line, figures)


def _figures(line: Row, wanted: dict[str, int | None]) -> Iterator[str]:
    has = line | {f"bytes_by_kind.{kind}": count for kind, count in line["bytes_by_kind"].items()}
    for field, number in wanted.items():
        if number is not None and has.get(field) != number:
            yield f"{where(line)}: {field} {has.get(field)}, should be {number}"


def _starts(run: Run, lines: dict[Key, list[Row]]) -> Iterator[str]:
    """Every start leaves the same lines on every rank. A start whose rounds were all lost again has left only these."""
    sizes = [life.size for life in run.lives]
    for rank in sorted({which[1] for which in lines} | set(range(max(sizes, default=0)))):
        counts = Counter({which[2:]: len(found) for which, found in lines.items() if which[1] == rank})
        wanted = _agreements(run, rank, counts) | dict.fromkeys(_CLOCKS, max(counts[which] for which in _CLOCKS) // TRIES * TRIES)
        wanted |= dict.fromkeys(_ADMISSION, min(wanted[which] for which in _AGREEMENT) if any(counts[which] for which in _ADMISSION) else 0)
        for which in sorted(counts.keys() | wanted.keys()):
            if counts[which] != wanted.get(which, 0):
                yield _count((0, rank, *which), counts[which], wanted.get(which, 0))
    for found in lines.values():
        for line in found:
            yield from _figures(line, _start_figures(run, line, sizes))


def _agreements(run: Run, rank: int, counts: Counter[tuple[str, str, str, str]]) -> dict[tuple[str, str, str, str], int]:
    """Return how often a rank must have agreed on a start; those who heal begin anew without asking whether all is well."""
    if run.config.clients.min_clients:
        return {which: max(counts[other] for other in _AGREEMENT if other[3] == which[3]) for which in _AGREEMENT}
    usual = Counter(counts[which] for which in _AGREEMENT).most_common(1)[0][0]
    return dict.fromkeys(_AGREEMENT, max(usual, sum(life.size > rank for life in run.lives)))


def _start_figures(run: Run, line: Row, sizes: Sequence[int]) -> dict[str, int | None]:
    size, gathered = _START_BYTES.get((line["op"], line["kind"])), line["op"] == "gather"
    clients = line["clients"] if gathered and line["kind"] == "clock" else 1  # only one rank answers
    figures = {"clients": clients, "payload_bytes": None if size is None else size * clients}
    if gathered and not line["rank"]:
        return figures  # what rank 0 received is the others' to say
    moves = {size > 1 for size in sizes} if not line["rank"] else {True}  # of several lives it is not told whose line this is
    admits = line["kind"] in {which[3] for which in _ADMISSION}  # before there is a key to seal with
    travels = line["payload_bytes"] if admits else run.protocol.carried(line["payload_bytes"])
    possible = {travels * (moved and line["clients"] > 0) for moved in moves}
    return figures | {"transport_bytes": line["transport_bytes"] if line["transport_bytes"] in possible else max(possible)}


def _count(which: Key, found: int, wanted: int) -> str:
    return f"{name(which)}: {found} line{'s' * (found != 1)}, {wanted or 'none'} should be there"


def name(which: Key) -> str:
    """Return words for a line's place."""
    number, rank, phase, op, direction, kind = which
    return f"ledger.jsonl: round {number}, rank {rank}: {op} {direction} {kind} of phase {phase}"


def where(line: Row) -> str:
    """Return words for a line's place."""
    return name(key(line))
