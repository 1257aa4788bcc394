"""The lines that every rank must have noted, worked out from the settings, the plan and who started when: the protocol as a list.

A run has one or more lives: the first begins at round 1, each resumption begins another, maybe on another number of ranks.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from slora_dist import personal
from slora_dist.comm.base import BUCKET
from slora_dist.comm.sealed import OVERHEAD, carried
from slora_dist.config import Config, LowrankPhase
from slora_dist.exchange import Exchange
from slora_dist.fixed import Fixed
from slora_dist.ledger import Row
from slora_dist.roundplan import RoundPlan, home, plan_round, present
from slora_dist.secure import KEY_BYTES
from slora_dist.topk import TopK
from slora_dist.upload import PROBE_BYTES, PROBES
from slora_dist.wire import HEADER_BYTES, Wire

FINGERPRINT_BYTES, WORD_BYTES = 32, 8
FREE = None  # a number that only the run knows
Key = tuple[int, int, str, str, str, str]  # round, rank, phase, op, direction, kind


@dataclass(frozen=True)
class Want:
    """One line of one rank. ``by_kind`` are the bytes of one client; None stands for what the settings do not tell."""

    round: int
    rank: int
    phase: str
    op: str
    direction: str
    by_kind: Mapping[str, int | None]
    clients: int
    transport: int | None
    needed: bool = True  # a round's collection of notes is itself noted a round later, or never
    headers: int = 0  # bytes that travel with a payload and are noted apart

    @property
    def key(self) -> Key:
        """What the line is, apart from its figures."""
        return self.round, self.rank, self.phase, self.op, self.direction, "+".join(self.by_kind)


def key(line: Row) -> Key:
    """Return what a line of the ledger says that it is."""
    return line["round"], line["rank"], line["phase"], line["op"], line["direction"], line["kind"]


@dataclass(frozen=True)
class Life:
    """The rounds ``first`` to ``last`` as the ranks ``members`` of ``size`` played them in one go: the others had died."""

    first: int
    last: int
    size: int
    members: tuple[int, ...]


class Protocol:
    """The run as its settings describe it.

    ``plan`` is ``plan.plan``'s, ``messages`` are those of each phase, ``sizes`` the clients' documents where every rank knows them,
    ``gone`` the clients that were not there in a round, as its record says.
    """

    def __init__(
        self,
        config: Config,
        plan: Mapping[str, Any],
        messages: Mapping[str, Exchange],
        sizes: Sequence[int] | None,
        gone: Mapping[int, Sequence[int]],
    ) -> None:
        self.config, self.plan, self.sizes, self.gone = config, plan, sizes, gone
        self.carried: Callable[[int], int] = partial(carried, payload=BUCKET - OVERHEAD) if config.comm.encrypt else int
        self.phases: list[Row] = []
        first = 1
        for phase, settings in zip(plan["phases"], config.method.resolved(), strict=True):
            keeps = isinstance(settings, LowrankPhase) and "keep" in (settings.residual, settings.remainder) and first > 1
            spreads = isinstance(settings, LowrankPhase) and config.server.svd == "ranks" and first > 1
            own = {"first": first, "folds": keeps, "spreads": spreads, "at": len(self.phases), "messages": messages[phase["phase"]]}
            self.phases.append({**phase, **own})
            first += phase["rounds"]
        self.rounds = first - 1

    def phase(self, number: int) -> Row:
        """Return the phase of round ``number``."""
        return next(phase for phase in reversed(self.phases) if phase["first"] <= number)

    def exchange(self, phase: Row, life: Life) -> Exchange:
        """Return the messages of a phase in a life."""
        messages: Exchange = phase["messages"]
        return messages.among(life.size, life.members, self.gone)

    def round_plan(self, number: int, life: Life) -> RoundPlan:
        """Return who plays in round ``number``."""
        return plan_round(self.config, number, life.size, self.sizes, life.members)

    def lives(self, ledger: Sequence[Row], done: int, missing: Mapping[int, Sequence[int]]) -> list[Life]:
        """Find the lives of a run of ``done`` rounds: every one tells its position and compares fingerprints where it begins.

        ``missing[number]`` are the ranks that had died by round ``number``, as its record says.
        """
        opening = {(phase["phase"], phase["first"]) for phase in self.phases}
        starts = {
            line["round"]
            for line in ledger
            if line["phase"] == "start" or (line["kind"] == "fingerprint" and (line["phase"], line["round"]) not in opening)
        }
        firsts = sorted({1} | {number for number in starts if 1 < number <= done})
        lasts = [number - 1 for number in firsts[1:]] + [done]
        spans = [(first, last) for first, last in zip(firsts, lasts, strict=True) if first <= last]
        return [_life(first, last, ledger, missing) for first, last in spans]

    def lines(self, life: Life, collective: Callable[[str], str]) -> Iterator[Want]:
        """Yield the lines of a life from its first round on. ``collective(phase)`` is how its updates were uploaded."""
        ranks = _Ranks(life, self.carried)
        yield from self._start(life, ranks)
        for number in range(life.first, life.last + 1):
            phase = self.phase(number)
            if number == phase["first"]:
                yield from self._open(phase, number, ranks)
            yield from self._round(phase, number, ranks, collective(phase["phase"]))
            ends = number == life.last  # the line of a round comes with the next one's notes, and those of a life's last round may be lost
            yield from ranks.gather(number, phase["phase"], "control", {"ledger": FREE}, [1] * life.size, FREE, needed=not ends)

    def _start(self, life: Life, ranks: "_Ranks") -> Iterator[Want]:
        for want in ranks.broadcast(life.first, "start", "control", {"position": 2 * WORD_BYTES}, [1] * life.size):
            yield replace(want, round=1) if want.rank else want  # they are just being told where the run stands
        if life.first > 1:
            phase = self.phase(life.first - 1)
            if self.config.keeps_state:
                counted = {"counted": WORD_BYTES * self.config.clients.count}
                yield from ranks.broadcast(life.first, "start", "control", counted, [1] * life.size)
            if any(earlier["folds"] or earlier["messages"].folding for earlier in self.phases[: phase["at"] + 1]):
                yield from ranks.broadcast(life.first, "start", "control", {"base": 4 * self.plan["parameters"]}, [1] * life.size)
            if selection := phase["messages"].selection:
                yield from ranks.broadcast(life.first, phase["phase"], "control", selection.down, [1] * life.size)
            yield from self._enter(phase, life.first, ranks, probes=False)
            if not phase["messages"].stateless:
                held = {"held": 4 * phase["trainable"]}
                yield from ranks.broadcast(life.first, phase["phase"], "control", held, [1] * life.size)
                if self.config.clients.min_clients:
                    absent = {"absent": -(-(life.first - phase["first"]) * self.config.clients.count // 8)}
                    yield from ranks.broadcast(life.first, phase["phase"], "control", absent, [1] * life.size)

    def _open(self, phase: Row, number: int, ranks: "_Ranks") -> Iterator[Want]:
        if selection := phase["messages"].selection:
            plan = self.round_plan(number, ranks.life)
            clients = [len(plan.played_by(rank)) for rank in range(ranks.size)]
            yield from ranks.gather(number, phase["phase"], "up", selection.up, clients, HEADER_BYTES + selection.wire.nbytes)
            yield from ranks.gather(number, phase["phase"], "control", {"header": HEADER_BYTES}, clients, 0)
            yield from ranks.broadcast(number, phase["phase"], "down", selection.down, self._hosted(ranks.size))
        yield from self._enter(phase, number, ranks)
        if phase["spreads"] and ranks.size > 1:
            offset = {"offset": 4 * self.phases[phase["at"] - 1]["trainable"]}
            yield from ranks.broadcast(number, phase["phase"], "control", offset, [1] * ranks.size)
            yield from ranks.gather(number, phase["phase"], "control", {"factors": FREE}, [1] * ranks.size, FREE)
        if phase["folds"]:
            for handed in (self.phases[phase["at"] - 1], phase):
                by_kind = handed["messages"].whole.down.by_kind()
                yield from ranks.broadcast(number, phase["phase"], "down", by_kind, self._hosted(ranks.size))

    def _enter(self, phase: Row, number: int, ranks: "_Ranks", probes: bool = True) -> Iterator[Want]:
        name, size = phase["phase"], ranks.size
        if self.config.comm.collective == "auto" and size > 1:
            probe = max(8, min(phase["message_bytes"]["up"], PROBE_BYTES)) // 8 * 8
            for _ in range((1 + PROBES) * probes):  # a run that is resumed is told what was chosen
                yield from ranks.gather(number, name, "control", {"probe": probe}, [0] + [1] * (size - 1), probe)
                yield from ranks.reduce(number, name, "control", {"probe": probe}, [1] * size, probe)
            yield from ranks.broadcast(number, name, "control", {"choice": WORD_BYTES}, [1] * size)
        yield from ranks.gather(number, name, "control", {"fingerprint": FINGERPRINT_BYTES}, [1] * size, FINGERPRINT_BYTES)

    def _round(self, phase: Row, number: int, ranks: "_Ranks", collective: str) -> Iterator[Want]:
        plan = self.round_plan(number, ranks.life)
        name, exchange = phase["phase"], self.exchange(phase, ranks.life)
        for message in exchange.down(number):
            concerned = [len(set(plan.played_by(rank)) & set(message.clients)) for rank in range(ranks.size)]
            yield from ranks.broadcast(number, name, "down", message.wires.down.by_kind(), concerned)
        for message in exchange.folds(number):
            yield from ranks.broadcast(number, name, "down", message.wires.down.by_kind(), self._hosted(ranks.size))
        for message in exchange.up(number):
            yield from self._upload(name, number, message.wires.up, plan.only(message.clients), ranks, collective)
        if personal.due(self.config, number):
            own = self._hosted(ranks.size, present(self.config, number, ranks.size, ranks.life.members))
            yield from ranks.broadcast(number, name, "control", {"evaluation": exchange.whole.down.nbytes}, own)
            yield from ranks.gather(number, name, "control", {"score": personal.SCORE_BYTES}, own, personal.SCORE_BYTES)

    def _upload(
        self, name: str, number: int, wire: Wire | TopK | Fixed, plan: RoundPlan, ranks: "_Ranks", collective: str
    ) -> Iterator[Want]:
        clients = [len(plan.played_by(rank)) for rank in range(ranks.size)]
        if self.config.comm.sum == "exact":
            yield from ranks.gather(number, name, "control", {"scale": WORD_BYTES}, clients, WORD_BYTES)
            yield from ranks.broadcast(number, name, "control", {"scale": WORD_BYTES}, [1] * ranks.size)
        if self.config.comm.secure:
            keys = {"key": KEY_BYTES * len(plan.clients)}
            yield from ranks.gather(number, name, "control", {"key": KEY_BYTES}, clients, KEY_BYTES)
            yield from ranks.broadcast(number, name, "control", keys, clients)
        headers = partial(ranks.gather, number, name, "control", {"header": HEADER_BYTES}, clients)
        if collective == "reduce":
            yield from ranks.reduce(number, name, "up", wire.by_kind(), clients, wire.nbytes)
            yield from headers(HEADER_BYTES)
        else:
            by_kind = {kind: FREE if kind == wire.varies else count for kind, count in wire.by_kind().items()}
            nbytes = FREE if wire.varies else HEADER_BYTES + wire.nbytes
            yield from ranks.gather(number, name, "up", by_kind, clients, nbytes, header=True)
            yield from headers(0)  # they travelled with the messages

    def _hosted(self, size: int, clients: Sequence[int] | None = None) -> list[int]:
        homes = Counter(home(client, size) for client in (range(self.config.clients.count) if clients is None else clients))
        return [homes[rank] for rank in range(size)]


@dataclass(frozen=True)
class _Ranks:
    """The lines of one collective on all ranks."""

    life: Life
    carried: Callable[[int], int]  # bytes that travel for a message of so many

    @property
    def size(self) -> int:
        """All ranks, dead ones too: lists of clients have an entry for each."""
        return self.life.size

    def broadcast(
        self, number: int, phase: str, direction: str, by_kind: Mapping[str, int | None], clients: Sequence[int]
    ) -> Iterator[Want]:
        nbytes = sum(count or 0 for count in by_kind.values())
        for rank in self.life.members:
            yield Want(number, rank, phase, "broadcast", direction, by_kind, clients[rank], self.carried(nbytes) if self.size > 1 else 0)

    def reduce(
        self, number: int, phase: str, direction: str, by_kind: Mapping[str, int | None], clients: Sequence[int], nbytes: int
    ) -> Iterator[Want]:
        for rank in self.life.members:
            yield Want(number, rank, phase, "reduce", direction, by_kind, clients[rank], nbytes if self.size > 1 else 0)

    def gather(
        self,
        number: int,
        phase: str,
        direction: str,
        by_kind: Mapping[str, int | None],
        clients: Sequence[int],
        nbytes: int | None,
        needed: bool = True,
        header: bool = False,
    ) -> Iterator[Want]:
        for rank in self.life.members:
            moved = clients[rank] if rank else sum(clients[other] for other in self.life.members[1:])
            transport = FREE if nbytes is FREE else moved * self.carried(nbytes) if nbytes else 0
            yield Want(
                number, rank, phase, "gather", direction, by_kind, clients[rank], transport, needed, HEADER_BYTES * clients[rank] * header
            )


def _life(first: int, last: int, ledger: Sequence[Row], missing: Mapping[int, Sequence[int]]) -> Life:
    """Return a life with the number of ranks in most of its rounds."""
    dead = set(missing.get(first, ()))
    most: dict[int, int] = {}
    for line in ledger:
        if first <= line["round"] <= last and line["phase"] != "start":
            most[line["round"]] = max(most.get(line["round"], 0), line["rank"] + 1)
    size = max(Counter(most.values()).most_common(1)[0][0] if most else 1, *(rank + 1 for rank in dead), 1)
    return Life(first, last, size, tuple(rank for rank in range(size) if rank not in dead))
