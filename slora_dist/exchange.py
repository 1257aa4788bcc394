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
from slora_dist.roundplan import absent, lost, sample
from slora_dist.support import KINDS, Kind, Part, Slot, Support
from slora_dist.wire import Wires


@dataclass(frozen=True)
class Message:
    """A message of a round, the same for all ``clients``: the part of the coordinates that it carries, and the codecs of that part.

    With ``variates`` the part's control variates follow its values.
    """

    part: Part
    wires: Wires
    clients: tuple[int, ...]
    variates: bool = False


class Exchange:
    """The messages of the phase that begins with round ``first`` of the run and moves ``coordinates``, of which ``pairs`` are factors.

    ``members`` of ``size`` ranks are there; ``among(size, members)`` is the same phase with others. ``everybody`` are the clients whose
    ranks are there, whether they take part in a round or not.
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
        self.everybody = tuple(sorted(set(range(config.clients.count)) - lost(config, size, members)))
        self.behaviour: Behaviour = behaviour(phase)
        self.holds = self.behaviour.holds or config.server.aggregate != "mean"
        self._sample = cache(lambda number: sample(config, number, absent(config, number, size, members)))
        self.among = partial(Exchange, config, phase, first, coordinates, pairs)
        self._part = cache(coordinates.part)
        self._settings, self._scaffold, self._kept = config.comm, config.clients.scaffold, tuple(config.clients.keep)
        shared = tuple(kind for kind in KINDS if kind not in self._kept)
        self._groups = (shared, *((kind,) for kind in self._kept)) if self._kept else self.behaviour.groups
        self._wires = cache(self._make_wires)

    @cached_property
    def selection(self) -> Selection | None:
        """The messages before the first round by which masks are chosen; None where they are known without."""
        return selection(self.phase, self.coordinates)

    @property
    def whole(self) -> Wires:
        """The codecs of all coordinates."""
        return self._wires(self._present(), False)

    @property
    def stateless(self) -> bool:
        """Whether every broadcast carries everything, so that a rank need not know of earlier ones."""
        return len(self._groups) == 1

    @property
    def variates(self) -> int:
        """The number of control variates: one for each coordinate that trains, or none."""
        return self.trains(self.first).support.numel if self._scaffold else 0

    @property
    def private(self) -> dict[Kind, Part]:
        """The coordinates that every client keeps to itself, by kind."""
        return {kind: self._part((kind,)) for kind in self._present(self._kept)}

    def trains(self, number: int) -> Part:
        """Return what clients train in round ``number``."""
        return self._part(self._present(self.behaviour.trains(number - self.first)))

    def up(self, number: int) -> Message:
        """Return the upload of round ``number``."""
        kinds = tuple(kind for kind in self._present(self.behaviour.trains(number - self.first)) if kind not in self._kept)
        return Message(self._part(kinds), self._wires(kinds, self._scaffold), self._sample(number), self._scaffold)

    def down(self, number: int) -> list[Message]:
        """Return the broadcasts of round ``number``."""
        lacks = {client: self._lacks(number, self._last(client, number)) for client in self._sample(number)}
        messages = []
        for kinds in self._present_groups():
            clients = tuple(client for client, lacking in lacks.items() if set(kinds) & set(lacking))
            if clients:
                doubled = self._doubled(kinds)
                messages.append(Message(self._part(kinds), self._wires(kinds, doubled), clients, doubled))
        return messages

    def folds(self) -> list[Message]:
        """Return the broadcast that ends a round, if the frozen base takes something over then: it concerns all clients that there are."""
        return [Message(Part(self._folded.down.support, None), self._folded, self.everybody)] if self._folded else []

    def numbers(self) -> range:
        """Return the rounds of the phase."""
        return range(self.first, self.first + self.rounds)

    def faithful(self) -> Iterator[tuple[int, int]]:
        """Yield for each round the bytes (up, down) of a client that takes part in every one of them."""
        for number in self.numbers():
            lacks = self._lacks(number, None if number == self.first else number - 1)
            groups = [kinds for kinds in self._present_groups() if set(kinds) & set(lacks)]
            folded = self._folded.down.nbytes if self._folded else 0
            yield self.up(number).wires.up.nbytes, sum(self._wires(kinds, self._doubled(kinds)).down.nbytes for kinds in groups) + folded

    def _present(self, kinds: Kinds | None = None) -> Kinds:
        """Return those of ``kinds`` that the phase has."""
        return tuple(kind for kind in self.coordinates.counts() if kinds is None or kind in kinds)

    def _present_groups(self) -> list[Kinds]:
        return [kinds for group in self._groups if (kinds := self._present(group))]

    def _doubled(self, kinds: Kinds) -> bool:
        """Whether control variates travel with these kinds: with those that train."""
        return self._scaffold and kinds == self._present(self.behaviour.trains(0))

    def _make_wires(self, kinds: Kinds, doubled: bool) -> Wires:
        slots = self._part(kinds).support.slots
        more = [Slot.whole(f"{slot.name} variate", (slot.count,), "variate") for slot in slots] if doubled else []
        return Wires.of(Support([*slots, *more]) if more else self._part(kinds).support, self._settings)

    def _lacks(self, number: int, last: int | None) -> Kinds:
        """Return what a client needs in round ``number`` that took part in round ``last`` for the last time, or in none."""
        if self.behaviour.restarts and number > self.first:
            return self._present(HEAD)
        if last is None or self.behaviour.changes_all:
            return self._present()
        changed = {kind for at in range(last, number) for kind in self.behaviour.trains(at - self.first)}
        return self._present(tuple(changed - set(self._kept)))

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
