"""The ledger's sums against the plan's, against the records of the rounds, and all of them against the summary."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from slora_dist.audit.run import WAYS, Run
from slora_dist.summary import summarize

_UNTOLD = ("lost", "clock_error_seconds")  # of the summary: what no other file tells, or not all of it


def plan(run: Run) -> Iterator[str]:
    """Payload of each phase, direction and kind, and of each round, is the plan's for the rounds that were played."""
    found = _found(run)
    planned = _planned(run, found)
    for phase, way, kind in sorted({which[1:] for which in found.keys() | planned.keys()}):
        has, should = (sum(nbytes for which, nbytes in sums.items() if which[1:] == (phase, way, kind)) for sums in (found, planned))
        if has != should:
            yield f"ledger.jsonl: phase {phase}, {way} {kind}: {has} bytes in all, planned are {should}"
    for which in sorted(found.keys() | planned.keys()):
        if found[which] != planned[which]:
            number, phase, way, kind = which
            yield f"ledger.jsonl: round {number} of phase {phase}, {way} {kind}: {found[which]} bytes, planned are {planned[which]}"


_Sums = Counter[tuple[int, str, str, str]]  # (round, phase, direction, kind) -> bytes


def _found(run: Run) -> _Sums:
    sums: _Sums = Counter()
    for line in run.ledger:
        for kind, nbytes in line["bytes_by_kind"].items() if line["direction"] in WAYS else ():
            sums[line["round"], line["phase"], line["direction"], kind] += nbytes
    return sums


def _planned(run: Run, found: _Sums) -> _Sums:
    """Return what the plan says; where a message has a size of its own, what was found, if it is possible."""
    sums: _Sums = Counter()
    most: _Sums = Counter()
    for number in range(1, run.done + 1):
        phase = run.protocol.phase(number)
        life = run.life(number)
        exchange = run.protocol.exchange(phase, life)
        sent = [("up", message.wires.up, len(message.clients)) for message in exchange.up(number)]
        sent += [("down", message.wires.down, len(message.clients)) for message in [*exchange.down(number), *exchange.folds(number)]]
        for way, wire, clients in sent:
            for kind, nbytes in wire.by_kind().items():
                at = number, phase["phase"], way, kind
                sums[at] += nbytes * clients
                if kind == wire.varies:
                    most[at] += wire.most * clients
        if (selection := exchange.selection) and number == phase["first"]:
            asked = sum(len(message.clients) for message in exchange.up(number))
            for way, by_kind, clients in (("up", selection.up, asked), ("down", selection.down, len(exchange.everybody))):
                for kind, nbytes in by_kind.items():
                    sums[number, phase["phase"], way, kind] += nbytes * clients
        if phase["folds"] and number == phase["first"]:
            for handed in (run.protocol.phases[phase["at"] - 1], phase):
                for kind, nbytes in handed["messages"].whole.down.by_kind().items():
                    sums[number, phase["phase"], "down", kind] += nbytes * len(exchange.everybody)
    for at, bound in most.items():
        if found[at] <= bound:
            sums[at] = found[at]
    return sums


def records(run: Run) -> Iterator[str]:
    """The record of every round is there once, with the clients that the seed draws and the ledger's bytes."""
    numbers = [record["round"] for record in run.metrics]
    if numbers != list(range(1, run.done + 1)):
        yield f"metrics.jsonl: rounds {numbers}, should be 1 to {run.done}, each once"
        return
    moved: Counter[tuple[int, str]] = Counter()
    for line in run.ledger:
        moved[line["round"], line["direction"]] += line["payload_bytes"]
    for record in run.metrics:
        number = record["round"]
        wanted = {
            "phase": run.protocol.phase(number)["phase"],
            "clients": list(run.protocol.round_plan(number, run.life(number)).clients),
            "payload_bytes": {way: moved[number, way] for way in WAYS},
        }
        for field, value in wanted.items():
            if record[field] != value:
                yield f"metrics.jsonl: round {number}: {field} {record[field]}, should be {value}"


def summary(run: Run) -> Iterator[str] | None:
    """Every figure of the summary comes out of the other files again, but for what only the switch and the loss of a rank could tell."""
    return _summary(run) if run.finished else None


def _summary(run: Run) -> Iterator[str]:
    found = run.folder.summary()
    if run.done != run.protocol.rounds:
        yield f"summary.json: there, though {run.done} of {run.protocol.rounds} rounds have a record"
        return
    made = summarize(run.config, run.folder, run.classifier, found["switch"], run.lives[-1].size)
    has, should = (dict(_leaves(tree)) for tree in (found, made | {name: found.get(name) for name in _UNTOLD}))
    for field in sorted(has.keys() | should.keys()):
        if has.get(field) != should.get(field):
            yield f"summary.json: {field} {has.get(field)}, the other files give {should.get(field)}"
    gone = {rank for record in run.metrics for rank in record.get("missing", {}).get("ranks", ())}
    if untold := sorted(gone - {loss["rank"] for loss in found.get("lost", ())}):
        yield f"summary.json: lost does not tell of ranks {untold}, which metrics.jsonl misses"
    if found["switch"]:
        last = run.protocol.phases[-1]["first"] - 1
        before, noted = found["switch"]["accuracy_before"], run.metrics[last - 1]["accuracy"]
        if before != noted:
            yield f"summary.json: switch.accuracy_before {before}, metrics.jsonl has {noted} in round {last}"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for field, value in tree.items():
        yield from _leaves(value, f"{prefix}.{field}" if prefix else field)
