"""One round, rank by rank: who trained, waited, moved data, aggregated and evaluated when.

A collective's ``seconds`` are those inside the transport; where a rank was busy with something else meanwhile (it trains its next client
between two sends), they are laid into the gaps that the timeline leaves: first the waiting, then the moving.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slora_dist.report.read import Line, Run

ACTIVITIES = ("train", "wait", "move", "aggregate", "evaluate", "switch", "checkpoint")


@dataclass(frozen=True)
class Bar:
    """A stretch of a rank's time: seconds since the round's first sign of life."""

    rank: int
    what: str
    begins: float
    seconds: float


def median_round(run: Run, phase: str) -> int:
    """Return the number of the phase's round that took the median time (the lower one of two)."""
    lines = sorted((line for line in run.rounds if line["phase"] == phase), key=lambda line: line["seconds"]["total"])
    number: int = lines[(len(lines) - 1) // 2]["round"]
    return number


def bars(run: Run, number: int) -> list[Bar]:
    """Return what all ranks did in round ``number``, or nothing where the run keeps no timeline."""
    did = [line for line in run.timeline if line["round"] == number]
    moved = [line for line in run.ledger if line["round"] == number and "began" in line]
    if not did:
        return []
    start = min(line["began"] for line in did + moved)
    found = []
    for rank in sorted({line["rank"] for line in did + moved}):
        busy = [_bar(line, start) for line in did if line["rank"] == rank]
        lines = sorted((line for line in moved if line["rank"] == rank), key=lambda line: line["began"])
        found += _nested(busy) + list(_laid(rank, lines, busy, start))
    return found


def _bar(line: Line, start: float) -> Bar:
    return Bar(line["rank"], line["what"], line["began"] - start, line["seconds"])


def _nested(busy: Sequence[Bar]) -> list[Bar]:
    """Order bars so that what lies within another is drawn over it."""
    return sorted(busy, key=lambda bar: -bar.seconds)


def _laid(rank: int, lines: Sequence[Line], busy: Sequence[Bar], start: float) -> Iterator[Bar]:
    free = 0.0  # this rank is in one collective at a time
    for line in lines:
        free = max(free, line["began"] - start)
        waits = min(line.get("wait_seconds", 0.0), line["seconds"])
        for what, seconds in (("wait", waits), ("move", line["seconds"] - waits)):
            for begins, length in gaps(free, seconds, busy):
                yield Bar(rank, what, begins, length)
                free = begins + length


def gaps(begins: float, seconds: float, busy: Sequence[Bar]) -> Iterator[tuple[float, float]]:
    """Lay ``seconds`` into the time from ``begins`` on that ``busy`` leaves free; yield (begin, length) of each piece."""
    for bar in sorted(busy, key=lambda bar: bar.begins):
        if seconds > 0 and bar.begins > begins:
            length = min(seconds, bar.begins - begins)
            yield begins, length
            seconds -= length
        begins = max(begins, bar.begins + bar.seconds)
    if seconds > 0:
        yield begins, seconds
