"""The messages of a phase, round by round: which coordinates travel, how they are encoded, and which clients they concern.

The run sends by this list, the plan adds it up and the audit holds the ledger against it. It follows from the settings and the seed alone.

What goes down to a client is what it lacks: coordinates that have changed since it took part, or all of them when it is new to the phase.
Coordinates that are lacked by the same clients in every round travel together as a group, and a group that nobody lacks stays where it is.
Where clients have factors of different ranks, a group goes down in bands of ranks, each to those whose rank reaches into it; up there is a
message for every rank that the round's clients have.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, partial
from itertools import pairwise

from slora_dist.aggregate.factors import Pair
from slora_dist.aggregate.rules import HEAD, Behaviour, Kinds, behaviour
from slora_dist.config import AnyPhase, Config
from slora_dist.fisher import Selection, selection
from slora_dist.roundplan import absent, lost, sample
from slora_dist.support import KINDS, WHOLE, Band, Kind, Part, Slot, Support, leading
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
    ranks are there, whether they take part in a round or not. ``gone`` are the clients that were not there in rounds that others may have
    played: {round: clients}.
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
        gone: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        self.phase, self.first, self.rounds, self.coordinates = phase, first, phase.rounds, coordinates
        self._pairs, self._bands = pairs, list(pairwise(sorted({Fraction(0), *phase.portions})))
        self.everybody = tuple(sorted(set(range(config.clients.count)) - lost(config, size, members)))
        self.behaviour: Behaviour = behaviour(phase)
        self.holds = self.behaviour.holds or config.server.aggregate != "mean"
        self._sample = cache(lambda number: sample(config, number, (gone or {}).get(number, absent(config, number, size, members))))
        self.among = partial(Exchange, config, phase, first, coordinates, pairs)
        self._part = cache(coordinates.part)
        self._settings, self._scaffold, self._kept = config.comm, config.clients.scaffold, tuple(config.clients.keep)
        shared = tuple(kind for kind in KINDS if kind not in self._kept)
        self._groups = (shared, *((kind,) for kind in self._kept)) if self._kept else self.behaviour.groups
        self._wires, self._fold_wires, self._sending = cache(self._make_wires), cache(self._make_fold_wires), cache(self._make_sending)

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

    def held_by(self, client: int) -> Part:
        """Return the coordinates that a client has: of factors the leading ranks, up to its own."""
        return self._part(self._present(), (WHOLE[0], self.phase.portion(client)))

    @property
    def folding(self) -> bool:
        """Whether rounds end with a broadcast of what the frozen base takes over."""
        return self.behaviour.fold is not None

    def sends(self, number: int) -> Part:
        """Return what travels up in round ``number``, from all clients together."""
        return self._part(self._sent(number))

    def up(self, number: int) -> list[Message]:
        """Return the uploads of round ``number``: one for every rank that its clients have, the smallest first."""
        clients: dict[Fraction, list[int]] = {}
        for client in self._sample(number):
            clients.setdefault(self.phase.portion(client), []).append(client)
        return [self._up(number, portion, own) for portion, own in sorted(clients.items())]

    def up_from(self, number: int, client: int) -> Message:
        """Return the upload of a client that takes part in round ``number``."""
        return self._up(number, self.phase.portion(client), [client])

    def largest(self, number: int) -> Wires:
        """Return the codecs of the upload of round ``number`` from a client of the largest rank, whether there is one then or not."""
        return self._up(number, max(self.phase.portions), []).wires

    def down(self, number: int) -> list[Message]:
        """Return the broadcasts of round ``number``."""
        lacks = {client: self._lacks(number, self._last(client, number)) for client in self._sample(number)}
        messages = []
        for kinds in self._present_groups():
            lacking = [client for client, lacks_of in lacks.items() if set(kinds) & set(lacks_of)]
            for band in self._bands_of(kinds):
                clients = tuple(client for client in lacking if self.phase.portion(client) > band[0])
                if clients:
                    doubled = self._doubled(kinds)
                    messages.append(Message(self._part(kinds, band), self._wires(kinds, doubled, band), clients, doubled))
        return messages

    def folds(self, number: int) -> list[Message]:
        """Return the broadcast that ends round ``number`` where the base takes something over: it concerns all clients that there are."""
        if not self.folding:
            return []
        wires = self._fold_wires(tuple(sorted(self.phase.portion(client) for client in self._sample(number))))
        return [Message(Part(wires.down.support, None), wires, self.everybody)]

    def numbers(self) -> range:
        """Return the rounds of the phase."""
        return range(self.first, self.first + self.rounds)

    def faithful(self) -> Iterator[tuple[int, int]]:
        """Yield for each round the bytes (up, down) of a client, of the largest rank, that takes part in every one of them."""
        for number in self.numbers():
            lacks = self._lacks(number, None if number == self.first else number - 1)
            groups = [kinds for kinds in self._present_groups() if set(kinds) & set(lacks)]
            wires = [self._wires(kinds, self._doubled(kinds), band) for kinds in groups for band in self._bands_of(kinds)]
            wires += [message.wires for message in self.folds(number)]
            yield self.largest(number).up.nbytes, sum(one.down.nbytes for one in wires)

    def _present(self, kinds: Kinds | None = None) -> Kinds:
        """Return those of ``kinds`` that the phase has."""
        return tuple(kind for kind in self.coordinates.counts() if kinds is None or kind in kinds)

    def _present_groups(self) -> list[Kinds]:
        return [kinds for group in self._groups if (kinds := self._present(group))]

    def _bands_of(self, kinds: Kinds) -> list[Band]:
        return [band for band in self._bands if self._part(kinds, band).support.numel]

    def _sent(self, number: int) -> Kinds:
        return tuple(kind for kind in self._present(self.behaviour.trains(number - self.first)) if kind not in self._kept)

    def _up(self, number: int, portion: Fraction, clients: Sequence[int]) -> Message:
        return Message(*self._sending(self._sent(number), portion), tuple(clients), self._scaffold)

    def _make_sending(self, kinds: Kinds, portion: Fraction) -> tuple[Part, Wires]:
        band = (WHOLE[0], portion)
        return self._part(kinds, band), self._wires(kinds, self._scaffold, band)

    def _doubled(self, kinds: Kinds) -> bool:
        """Whether control variates travel with these kinds: with those that train."""
        return self._scaffold and kinds == self._present(self.behaviour.trains(0))

    def _make_wires(self, kinds: Kinds, doubled: bool = False, band: Band = WHOLE) -> Wires:
        support = self._part(kinds, band).support
        more = [Slot.whole(f"{slot.name} variate", (slot.count,), "variate") for slot in support.slots] if doubled else []
        return Wires.of(Support([*support.slots, *more]) if more else support, self._settings)

    def _make_fold_wires(self, portions: Sequence[Fraction]) -> Wires:
        """Return the codecs of what the base takes over: for every layer the factors of clients with these ``portions`` side by side."""
        slots = []
        for pair in self._pairs:
            columns = sum(leading(pair.rank, portion) for portion in portions) + self.behaviour.mean_too * pair.rank
            slots.append(Slot.whole(f"{pair.layer}.fold_A", (columns, pair.in_features), "factor_a"))
            slots.append(Slot.whole(f"{pair.layer}.fold_B", (pair.out_features, columns), "factor_b"))
        return Wires.of(Support(slots), self._settings)

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
