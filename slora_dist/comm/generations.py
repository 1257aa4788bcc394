"""One process group after the other: each is formed by those whom the lifeline calls together, and cut when it says that it is over."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from slora_dist.comm.lifeline import Loss, Meeting
from slora_dist.comm.patience import Patience
from slora_dist.comm.root_lifeline import Lifeline
from slora_dist.comm.sever import sever, sockets
from slora_dist.errors import ConfigError, TransportError

AGAIN = 0.2  # seconds between two cuts, as long as this rank has not left: a group that is just forming opens new connections


@dataclass
class _Group:
    """A process group: the sockets that were open before it, its own (None while it is being formed), and whether this rank has left."""

    generation: int
    before: set[str]
    own: set[str] | None = None
    left: threading.Event = field(default_factory=threading.Event)
    patience: Patience = field(default_factory=Patience)

    def cut(self, spared: set[int]) -> None:
        sever(set(sockets()) - self.before if self.own is None else self.own, spared)


class Generations:
    """The process groups of one rank."""

    def __init__(self, lifeline: Lifeline, seconds: float) -> None:
        self.lifeline, self.joins, self._seconds = lifeline, lifeline.joins, seconds
        self._group: _Group | None = None
        lifeline.on_over = self._cut

    @property
    def number(self) -> int:
        """The number of the present group, from 0."""
        return self.lifeline.generation

    @property
    def over(self) -> bool:
        """Whether the present group is."""
        return self.lifeline.ended(self.lifeline.generation)

    @property
    def losses(self) -> Sequence[Loss]:
        """The ranks that rank 0 has seen go, in order."""
        return self.lifeline.losses

    @property
    def session(self) -> bytes:
        """The key of the run's session: a rank that joins is handed it by rank 0."""
        assert self.lifeline.session is not None
        return self.lifeline.session

    def begin(self, session: bytes, holdings: bytes, judge: Callable[[int, bytes], ConfigError | None]) -> None:
        """Let ranks join from now on: who has loaded what this rank has, by its ``holdings`` and rank 0's judgement of the other's."""
        self.lifeline.begin(session, holdings, judge)

    def refuse(self, rank: int, error: ConfigError) -> bool:
        """On rank 0: send a rank away that has joined; return whether it had. The present group is over then."""
        return self.lifeline.refuse(rank, error)

    def wait(self, call: Callable[[], object]) -> None:
        """Return when ``call``, which waits for the present group, has.

        Raises ``TransportError`` when the group is over before, another ``RunError`` when all are since rank 0 is gone.
        """
        assert self._group
        try:
            self._group.patience.wait(call)
        except Exception:
            self.lifeline.check()
            raise

    def leave(self) -> None:
        """Cut this rank's connections of the present group, so that whoever waits for it learns that it has left."""
        if self._group:
            self._group.left.set()
            self._group.cut(self.lifeline.sockets())
            self._group.patience.end()

    def meet(self, seconds: float | None) -> Meeting:
        """Wait for the meeting of the next group, for the transport's own time-out where ``seconds`` is None."""
        return self.lifeline.meet(seconds or self._seconds)

    @contextmanager
    def next(self, rank: int, seconds: float | None) -> Iterator[Meeting]:
        """Meet, and note the connections that are opened inside, to be cut when the group is over."""
        meeting = self.meet(seconds)
        self._group = group = _Group(meeting.generation, set(sockets()))
        if self.lifeline.ended(meeting.generation):
            raise TransportError(f"rank {rank}: regroup failed: somebody has died meanwhile")
        yield meeting
        group.own = set(sockets()) - group.before

    def welcome(self) -> None:
        """On rank 0, between two rounds: raise ``TransportError`` when a rank waits to join, so that all ranks regroup."""
        waiting = self.lifeline.newcomers()
        if waiting:
            raise TransportError(f"rank 0: rank {', '.join(map(str, waiting))} joins")

    def _cut(self, generation: int) -> None:
        """Cut the connections of a group that is over until this rank has left it. Called in a thread of the lifeline."""
        group = self._group
        while group and group.generation <= generation and not group.left.is_set():
            group.cut(self.lifeline.sockets())
            if not group.left.wait(AGAIN):
                group.patience.give_up()
