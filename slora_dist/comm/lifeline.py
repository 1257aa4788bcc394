"""The lifeline: a connection from every rank to rank 0, beside the transport, by which ranks learn who is gone and how to go on.

gloo tells of a broken connection only whom it concerns, and of a rank that stands still nobody before a time-out that has to cover a
client's training. On the lifeline every rank says each second that it lives. A closed connection is a death, and so is silence for
``patience`` seconds in which one listened. Rank 0 then declares the *generation* (one process group) over; all ranks leave it, and meet in
the next one:

    OVER g             rank 0 -> all     generation g has ended: cut its connections, so that nobody waits in it any longer
    READY g, holdings  rank -> rank 0    this rank has left generation g; a rank that joins has left all, and says what it has loaded
    REFUSED reason     rank 0 -> rank    ... which is not what rank 0 has: it may not join
    MEET g, members    rank 0 -> all     the next generation and who is in it, once every rank that lives is ready

A rank that is in the middle of training finishes first: it lives, so the others wait for it. For one that joins they do not wait before it
is ready: it may take long to load a model, or for ever.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from slora_dist.comm.line import FRAME_SECONDS, await_sign, call
from slora_dist.errors import ConfigError, RootGone, RunError

BEAT = 1.0  # seconds between two signs of life
ALIVE, OVER, READY, MEET, BYE, REFUSED = range(6)
GENERATION_BYTES = 8
FRESH = 1 << 40  # the generation that a rank has left that was in none


@dataclass(frozen=True)
class Healing:
    """What ranks need to go on when one of them dies: the seconds of silence that count as death, the job's secret, this rank's
    ``account`` of what all must have alike, how it judges another rank's, and whether it joins a run that is under way.
    """

    patience: float
    secret: bytes
    account: bytes
    judge: Callable[[int, bytes], ConfigError | None]
    joins: bool


@dataclass(frozen=True)
class Meeting:
    """A generation of the world: its number, and the ranks that are in it."""

    generation: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class Loss:
    """A rank that is gone, and how that showed."""

    rank: int
    reason: str


class RankLifeline:
    """The end of every other rank. ``on_over(generation)`` is called, in a thread of its own, when one ends, or all as rank 0 is gone."""

    def __init__(self, host: str, port: int, rank: int, healing: Healing, seconds: float) -> None:
        connection = socket.create_connection((host, port), timeout=seconds)
        self.rank, self.patience, self.joins = rank, max(healing.patience, FRAME_SECONDS), healing.joins
        self.on_over: Callable[[int], None] = lambda _: None
        self.generation = -1
        account = healing.account if healing.joins else b""
        self._line, self.session = call(connection, healing.secret, account, rank, healing.joins)
        self._holdings = b""
        self._meeting = Meeting(-1, ())
        self._ended = -1  # the last generation that rank 0 has declared over
        self._gone = ""  # what has become of rank 0, or of this rank in its eyes
        self._silent = False  # whether that is silence
        self._refused: ConfigError | None = None
        self._change = threading.Condition()
        self._closed = False
        for name, task in (("lifeline", self._hear), ("heartbeat", self._beat)):
            threading.Thread(target=task, name=name, daemon=True).start()

    def begin(self, session: bytes, holdings: bytes, judge: Callable[[int, bytes], ConfigError | None]) -> None:
        """Note what this rank has loaded: rank 0 is told when this rank joins. The rest is rank 0's to know."""
        self._holdings = holdings

    def meet(self, seconds: float) -> Meeting:
        """Tell rank 0 that this rank has left its generation, and return the next one, which may be over already.

        Raises ``RunError`` when rank 0 is gone, has given this rank up, or does not call within ``seconds``, and the ``ConfigError`` with
        which it refuses a rank that joins.
        """
        ready = FRESH.to_bytes(GENERATION_BYTES, "little") + self._holdings
        if self.generation >= 0:
            ready = self.generation.to_bytes(GENERATION_BYTES, "little")
        deadline = time.monotonic() + seconds
        with suppress(OSError):  # whoever hears is told why: a goodbye may be there, and must not be overtaken
            self._line.send(READY, ready)
        with self._change:
            while self._meeting.generation <= self.generation or self.rank not in self._meeting.members:
                self.check()
                if time.monotonic() > deadline:
                    raise RootGone(f"rank {self.rank}: rank 0 has not called the ranks together within {seconds:g} s")
                self._change.wait(BEAT)
            self.generation = self._meeting.generation
            return self._meeting

    def refuse(self, rank: int, error: ConfigError) -> bool:
        """Return False: only rank 0 refuses."""
        return False

    def check(self) -> None:
        """Raise what stands between this rank and rank 0, if something does."""
        if self._refused:
            raise self._refused
        if self._gone:
            kind = RootGone if self._silent else RunError
            raise kind(f"rank {self.rank}: rank 0 is gone, or has given this rank up ({self._gone})")

    def ended(self, generation: int) -> bool:
        """Whether a generation is over."""
        return bool(self._gone) or generation <= self._ended

    def newcomers(self) -> list[int]:
        """Return nothing: only rank 0 knows."""
        return []

    @property
    def losses(self) -> list[Loss]:
        """Nothing: only rank 0 knows."""
        return []

    def close(self) -> None:
        """Say goodbye."""
        self._closed = True
        with suppress(OSError):  # rank 0 was quicker
            self._line.send(BYE)
        self._line.close()

    def sockets(self) -> set[int]:
        """Return the descriptor of the lifeline itself."""
        return {self._line.socket.fileno()}

    def _hear(self) -> None:
        try:
            while True:
                await_sign(self._line.socket, self.patience)
                kind, body = self._line.receive()
                if kind == OVER:
                    self._ended = int.from_bytes(body, "little")
                    self.on_over(self._ended)
                elif kind == MEET:
                    generation, members = json.loads(body)
                    with self._change:
                        self._meeting = Meeting(generation, tuple(members))
                        self._change.notify_all()
                elif kind == REFUSED:
                    with self._change:
                        self._refused = ConfigError(*json.loads(body))
                        self._change.notify_all()
                elif kind == BYE:
                    with self._change:  # who still waits for a meeting waits in vain
                        self._gone = "the run has ended"
                        self._change.notify_all()
                    return
        except TimeoutError:
            self._silent = True
            self._leave(f"silent for {self.patience:g} s")
        except (OSError, RunError, ValueError) as error:
            self._leave(str(error))

    def _leave(self, reason: str) -> None:
        if self._closed:
            return
        with self._change:
            self._gone = self._gone or reason
            self._change.notify_all()
        self.on_over(FRESH)

    def _beat(self) -> None:
        while not self._closed and not self._gone:
            try:
                self._line.send(ALIVE)
            except OSError:
                return
            time.sleep(BEAT)
