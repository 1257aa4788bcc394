"""What a rank notes of a round, how rank 0 collects it, and how waiting is told from moving once all ranks' clocks are known.

Three files come of it: ``ledger.jsonl`` (collectives), ``timeline.jsonl`` (what a rank did between them) and ``counters.jsonl`` (what the
kernel counted). A rank's notes travel as JSON.
"""

import json
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from slora_dist.counters import Counters, place
from slora_dist.errors import RunError
from slora_dist.ledger import Entry, Ledger, Row, broken_off, line


@dataclass(frozen=True)
class _Span:
    round: int
    phase: str
    what: str
    client: int | None
    began: float
    seconds: float


@dataclass(frozen=True)
class _Counted:
    host: str
    round: int
    tcp: dict[str, int]
    interfaces: dict[str, dict[str, int]]
    infiniband: dict[str, dict[str, int]]


@dataclass(frozen=True)
class _Notes:
    """What a rank's notes must be: they come from another process, which may be damaged or mean harm."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    entries: list[Entry]
    broken: list[Entry]
    spans: list[_Span]
    counters: _Counted
    place: str


_NOTES = TypeAdapter(_Notes)


@dataclass(frozen=True)
class _Told:
    """What a rank told of round ``number``. It knows that rank 0 has all of it only when the next round begins."""

    number: int = 0
    entries: Sequence[Entry] = ()
    broken: Sequence[Entry] = ()
    spans: Sequence[Row] = ()


class Journal:
    """This rank's notes since they were last taken. ``beside`` tells the sockets whose bytes are not the transport's."""

    def __init__(self, ledger: Ledger, beside: Callable[[], Collection[int]] = tuple) -> None:
        self.ledger = ledger
        self._spans: list[Row] = []
        self._told = _Told()
        self._counters = Counters(beside)
        self._place = place()

    @contextmanager
    def span(self, what: str, phase: str, number: int, client: int | None = None) -> Iterator[None]:
        """Note the time that the block takes as ``what`` (train, aggregate, evaluate, switch, checkpoint) of round ``number``."""
        began = time.perf_counter()
        yield
        self.note(what, phase, number, began, time.perf_counter() - began, client)

    def note(self, what: str, phase: str, number: int, began: float, seconds: float, client: int | None = None) -> None:
        """Note a span that was timed elsewhere; ``began`` is this rank's ``time.perf_counter()``."""
        self._spans.append({"round": number, "phase": phase, "what": what, "client": client, "began": began, "seconds": seconds})

    def take(self, number: int) -> bytes:
        """Return the notes since the last call as JSON, for rank 0 to collect; kernel counters are those of round ``number``."""
        broken, self.ledger.broken = self.ledger.broken, []
        self._told = _Told(number, self.ledger.take(), broken, self._spans)
        notes = {
            "entries": [_noted(entry) for entry in self._told.entries],
            "broken": [_noted(entry) for entry in broken],
            "spans": self._spans,
            "counters": {"host": socket.gethostname(), "round": number, **self._counters.since()},
            "place": self._place,
        }
        self._spans = []
        return json.dumps(notes).encode()

    def recall(self, done: int) -> None:
        """Take back what was told last, of collectives that came to nothing, unless rank 0 had it: the run goes on after round ``done``."""
        if self._told.number > done:
            self.ledger.broken = [*self._told.broken, *map(broken_off, self._told.entries), *self.ledger.broken]
            self._spans = [*self._told.spans, *self._spans]
        self._told = _Told()


def settle(notes: Mapping[int, bytes], shifts: Mapping[int, float]) -> dict[str, list[Row]]:
    """Return the lines of ``ledger``, ``timeline`` and ``counters`` for the notes of all ranks.

    ``shifts[rank]`` is what a rank's monotonic clock lacks to Unix time on rank 0's clock, in seconds.
    """
    parsed = {rank: _read(rank, text) for rank, text in notes.items()}
    entries = {rank: rows.entries for rank, rows in parsed.items()}
    timeline = [
        {"rank": rank, **vars(span), "began": round(span.began + shifts[rank], 6), "seconds": round(span.seconds, 6)}
        for rank, rows in parsed.items()
        for span in rows.spans
    ]
    broken = [line(rank, entry, entry.timing.began + shifts[rank], 0.0) for rank, rows in parsed.items() for entry in rows.broken]
    return {"ledger": _lines(entries, shifts) + broken, "timeline": timeline, "counters": _counters(parsed)}


def _noted(entry: Entry) -> Row:
    return {**vars(entry), "label": vars(entry.label), "timing": vars(entry.timing)}


def _read(rank: int, text: bytes) -> _Notes:
    try:
        return _NOTES.validate_json(text)
    except ValidationError as error:
        raise RunError(f"rank {rank}: its notes of the round cannot be read ({error.errors()[0]['msg']})") from None


def _counters(parsed: Mapping[int, _Notes]) -> list[Row]:
    """Keep the interfaces of a host once: all ranks on it have read the same ones."""
    seen: set[str] = set()
    rows = []
    for rank, notes in parsed.items():
        counters = {"rank": rank, **vars(notes.counters)}
        if notes.place in seen:
            counters |= {"interfaces": {}, "infiniband": {}}
        seen.add(notes.place)
        rows.append(counters)
    return rows


def _lines(entries: Mapping[int, Sequence[Entry]], shifts: Mapping[int, float]) -> list[Row]:
    """Compare the ranks collective by collective: all of them have gone through the same ones in the same order."""
    _compare(entries)
    waits: dict[int, list[float]] = {rank: [] for rank in entries}
    for collective in zip(*entries.values(), strict=True):
        ranks = dict(zip(entries, collective, strict=True))
        for rank, moved in _moving(ranks, shifts).items():
            seconds = ranks[rank].timing.seconds
            waits[rank].append(min(seconds, max(0.0, seconds - moved)))
    return [
        line(rank, entry, entry.timing.began + shifts[rank], wait)
        for rank, own in entries.items()
        for entry, wait in zip(own, waits[rank], strict=True)
    ]


def _compare(entries: Mapping[int, Sequence[Entry]]) -> None:
    """Raise ``RunError`` where the notes of a rank tell of other collectives than the first one's, or of other messages in them."""
    first, *others = entries
    for rank in others:
        if [entry.op for entry in entries[rank]] != [entry.op for entry in entries[first]]:
            raise RunError(f"rank {rank}: its notes of the round tell of other collectives than rank {first}'s")
        for root, own in zip(entries[first], entries[rank], strict=True):
            if len(own.timing.ready) != list(root.timing.senders).count(rank):
                raise RunError(f"rank {rank}: its notes of the round tell of {len(own.timing.ready)} messages in a {own.op}")


def _moving(ranks: Mapping[int, Entry], shifts: Mapping[int, float]) -> dict[int, float]:
    """Return the seconds of one collective on each rank in which data could move, because those who contribute were ready.

    A broadcast needs rank 0, and on rank 0 the last who receives; a reduce everybody. A gather moves message after message: each from the
    moment at which it was ready and the one before had arrived, until it arrived, without what rank 0 did besides.
    """
    if len(ranks) == 1:
        return {rank: entry.timing.seconds for rank, entry in ranks.items()}
    root = ranks[0].timing
    if root.senders:
        return _gathering(ranks, shifts)
    began = {rank: entry.timing.began + shifts[rank] for rank, entry in ranks.items()}
    latest = max(began.values())
    needed = {rank: began[0] if entry.op == "broadcast" and rank else latest for rank, entry in ranks.items()}
    return {rank: entry.timing.seconds - max(0.0, needed[rank] - began[rank]) for rank, entry in ranks.items()}


def _gathering(ranks: Mapping[int, Entry], shifts: Mapping[int, float]) -> dict[int, float]:
    root = ranks[0].timing
    ready = {rank: iter(entry.timing.ready) for rank, entry in ranks.items()}
    moved = dict.fromkeys(ranks, 0.0)
    before, outside_before = root.began, 0.0
    for sender, (arrived, outside) in zip(root.senders, root.arrived, strict=True):
        made = next(ready[sender]) + shifts[sender] - shifts[0]
        if sender:
            seconds = max(0.0, arrived - max(made, before) - (outside - outside_before))
            moved[0] += seconds
            moved[sender] += seconds
        before, outside_before = arrived, outside
    return moved
