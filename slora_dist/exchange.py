"""The messages of a phase, round by round: which coordinates travel, how they are encoded, and which clients they concern.

The run sends by this list, the plan adds it up and the audit holds the ledger against it. It follows from the settings and the seed alone.

What goes down to a client is what it lacks: coordinates that have changed since it took part, or all of them when it is new to the phase.
Coordinates that are lacked by the same clients in every round travel together as a group, and a group that nobody lacks stays where it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

from slora_dist.aggregate.factors import Pair
from slora_dist.aggregate.rules import HEAD, Behaviour, Kinds, behaviour, width
from slora_dist.config import AnyPhase, CommConfig, Config
from slora_dist.fisher import Selection, selection
from slora_dist.roundplan import absent, sample
from slora_dist.support import Part, Slot, Support
from slora_dist.wire import Wires


@dataclass(frozen=True)
class Message:
    """A message of a round, the same for all ``clients``: the part of the coordinates that it carries, and the codecs of that part."""

    part: Part
    wires: Wires
    clients: tuple[int, ...]


class Exchange:
    """The messages of the phase that begins with round ``first`` of the run and moves ``coordinates``, of which ``pairs`` are factors.

    ``members`` of ``size`` ranks are there; ``among(size, members)`` is the same phase with others.
    """

    def __init__(
        self,
        config: Config,
        phase: AnyPhase,
        first: int,
        coordinates: Support,
        pairs: Sequence[Pair],
        size: int = 1,
        members: Sequence[int] = (0,),
    ) -> None:
        self.phase, self.first, self.rounds, self.coordinates = phase, first, phase.rounds, coordinates
        self._folded = _folded(pairs, width(phase, config.sampled), config.comm)
        self._everybody = tuple(range(config.clients.count))
        self.behaviour: Behaviour = behaviour(phase)
        self._sample = cache(lambda number: sample(config, number, absent(config, number, size, members)))
        self.among = partial(Exchange, config, phase, first, coordinates, pairs)
        self._part = cache(coordinates.part)
        self._wires = cache(lambda kinds: Wires.of(self._part(kinds).support, config.comm))

    @cached_property
    def selection(self) -> Selection | None:
        """The messages before the first round by which masks are chosen; None where they are known without."""
        return selection(self.phase, self.coordinates)

    @property
    def whole(self) -> Wires:
        """The codecs of all coordinates."""
        return self._wires(self._present())

    @property
    def stateless(self) -> bool:
        """Whether every broadcast carries everything, so that a rank need not know of earlier ones."""
        return len(self.behaviour.groups) == 1

    def trains(self, number: int) -> Part:
        """Return what clients train in round ``number``."""
        return self._part(self._present(self.behaviour.trains(number - self.first)))

    def up(self, number: int) -> Message:
        """Return the upload of round ``number``."""
        kinds = self._present(self.behaviour.trains(number - self.first))
        return Message(self._part(kinds), self._wires(kinds), self._sample(number))

    def down(self, number: int) -> list[Message]:
        """Return the broadcasts of round ``number``."""
        lacks = {client: self._lacks(number, self._last(client, number)) for client in self._sample(number)}
        messages = []
        for group in self.behaviour.groups:
            clients = tuple(client for client, kinds in lacks.items() if set(group) & set(kinds))
            if clients and (kinds := self._present(group)):
                messages.append(Message(self._part(kinds), self._wires(kinds), clients))
        return messages

    def folds(self) -> list[Message]:
        """Return the broadcast that ends a round, if the frozen base takes something over then: it concerns all clients that there are."""
        return [Message(Part(self._folded.down.support, None), self._folded, self._everybody)] if self._folded else []

    def numbers(self) -> range:
        """Return the rounds of the phase."""
        return range(self.first, self.first + self.rounds)

    def faithful(self) -> Iterator[tuple[int, int]]:
        """Yield for each round the bytes (up, down) of a client that takes part in every one of them."""
        for number in self.numbers():
            lacks = self._lacks(number, None if number == self.first else number - 1)
            groups = [kinds for group in self.behaviour.groups if set(group) & set(lacks) and (kinds := self._present(group))]
            folded = self._folded.down.nbytes if self._folded else 0
            yield self.up(number).wires.up.nbytes, sum(self._wires(kinds).down.nbytes for kinds in groups) + folded

    def _present(self, kinds: Kinds | None = None) -> Kinds:
        """Return those of ``kinds`` that the phase has."""
        return tuple(kind for kind in self.coordinates.counts() if kinds is None or kind in kinds)

    def _lacks(self, number: int, last: int | None) -> Kinds:
        """Return what a client needs in round ``number`` that took part in round ``last`` for the last time, or in none."""
        if self.behaviour.restarts and number > self.first:
            return self._present(HEAD)
        if last is None or self.behaviour.changes_all:
            return self._present()
        changed = {kind for at in range(last, number) for kind in self.behaviour.trains(at - self.first)}
        return self._present(tuple(changed))

    def _last(self, client: int, number: int) -> int | None:
        """Return the last round of the phase before ``number`` in which ``client`` took part."""
        if self.stateless:
            return None
        return next((at for at in range(number - 1, self.first - 1, -1) if client in self._sample(at)), None)


def _folded(pairs: Sequence[Pair], blocks: int, comm: CommConfig) -> Wires | None:
    """Return the codecs of what the base takes over, ``blocks`` clients' factors wide: for every layer its left and its right factor."""
    slots = []
    for pair in pairs if blocks else ():
        columns = blocks * pair.rank
        slots.append(Slot.whole(f"{pair.layer}.fold_A", (columns, pair.in_features), "factor_a"))
        slots.append(Slot.whole(f"{pair.layer}.fold_B", (pair.out_features, columns), "factor_b"))
    return Wires.of(Support(slots), comm) if slots else None
