"""The lifeline: a connection from every rank to rank 0, beside the transport, by which ranks learn who is gone and how to go on.

gloo tells of a broken connection only whom it concerns, and of a rank that stands still nobody before a time-out that has to cover a
client's training. On the lifeline every rank says each second that it lives. A closed connection is a death, and so is silence for
``patience`` seconds. Rank 0 then declares the *generation* (one process group) over; all ranks leave it, and meet in the next one:

    OVER g             rank 0 -> all     generation g has ended: cut its connections, so that nobody waits in it any longer
    READY g            rank -> rank 0    this rank has left generation g (a rank that joins has left all)
    MEET g, members    rank 0 -> all     the next generation and who is in it, once every rank that lives is ready

A rank that is in the middle of training finishes first: it lives, so the others wait for it.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from slora_dist.comm.line import FRAME_SECONDS, Line, answer, call
from slora_dist.errors import ConfigError, RunError
from slora_dist.log import say

BEAT = 1.0  # seconds between two signs of life
ALIVE, OVER, READY, MEET, BYE = range(5)
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


class RootLifeline:
    """Rank 0's end: it watches all others. ``on_over(generation)`` is called, in a thread of its own, when one ends."""

    joins = False

    def __init__(self, listener: socket.socket, size: int, healing: Healing) -> None:
        self.size, self.patience, self._healing = size, healing.patience, healing
        self.on_over: Callable[[int], None] = lambda _: None
        self.generation, self.members = -1, tuple(range(size))
        self.losses: list[Loss] = []
        self.session: bytes | None = None  # the key of the run's session, once it has begun
        self._lines: dict[int, Line] = {}
        self._left: dict[int, int] = {}  # the generation that each rank has left
        self._change = threading.Condition()
        self._over = False  # whether the present generation is
        self._closed = False
        self._listener = listener
        self.port: int = self._listener.getsockname()[1]
        for name, task in (("lifeline", self._listen), ("heartbeat", self._beat)):
            threading.Thread(target=task, name=name, daemon=True).start()

    def meet(self, seconds: float) -> Meeting:
        """End the present generation, wait for every rank that lives, and open the next with them.

        The first waits for all ``size`` ranks. A rank that lives but does not come within ``seconds`` is given up. Raises ``RunError``
        when the first meeting is not complete by then.
        """
        deadline = time.monotonic() + seconds
        self._end(self.generation)
        with self._change:
            while missing := self._missing():
                if time.monotonic() > deadline:
                    if self.generation < 0:
                        raise RunError(f"rank 0: connect within {seconds:.0f} s failed: rank {missing[0]} has not come")
                    for rank in missing:
                        self._lose(rank, f"not ready within {seconds:g} s")
                self._change.wait(BEAT)
            self.generation, self._over = self.generation + 1, False
            self.members = (0, *sorted(self._lines))
            self._left.clear()
            body = json.dumps([self.generation, self.members]).encode()
            for rank in list(self._lines):
                self._send(rank, MEET, body)
        return Meeting(self.generation, self.members)

    def ended(self, generation: int) -> bool:
        """Whether a generation is over."""
        with self._change:
            return generation < self.generation or self._over

    def newcomers(self) -> list[int]:
        """Return the ranks that wait for the next generation and are in none."""
        with self._change:
            return sorted(set(self._lines) - set(self.members))

    def close(self) -> None:
        """Say goodbye to all."""
        with self._change:
            self._closed = True
            for rank in list(self._lines):
                self._send(rank, BYE)
            for line in self._lines.values():
                line.close()
        self._listener.close()

    def sockets(self) -> set[int]:
        """Return the descriptors of the lifeline itself."""
        with self._change:
            return {self._listener.fileno(), *(line.socket.fileno() for line in self._lines.values())}

    def _missing(self) -> list[int]:
        """Return the ranks that the next generation waits for."""
        if self.generation < 0:
            return [rank for rank in range(1, self.size) if rank not in self._lines or rank not in self._left]
        return [rank for rank in self._lines if self._left.get(rank, -1) < self.generation]

    def _end(self, generation: int) -> None:
        """Declare a generation over, once."""
        with self._change:
            if self._over or self.generation != generation or generation < 0:
                return
            self._over = True
            for rank in list(self._lines):
                self._send(rank, OVER, self.generation.to_bytes(8, "little"))
        self.on_over(generation)

    def _listen(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed: the run has ended
                return
            threading.Thread(target=self._answer, args=(connection, address[0]), daemon=True).start()

    def _answer(self, connection: socket.socket, address: str) -> None:
        """Take in a rank that calls, and read what it says until it is gone."""
        try:
            line, rank, joins = answer(connection, self._healing.secret, self.size, self._judge)
        except (OSError, RunError) as error:
            say(0, f"refused a connection from {address}: {error}")
            connection.close()
            return
        with self._change:
            if rank in self._lines:
                say(0, f"refused a connection from {address}: rank {rank} is here already")
                connection.close()
                return
            self._lines[rank] = line
            self._left.pop(rank, None)
        if joins:
            say(0, f"rank {rank} has come to join the run")
        self._hear(rank, line)

    def _judge(self, rank: int, joins: bool, account: bytes) -> bytes | ConfigError:
        """Return what a rank that joins gets: the session's key, or why it may not. Who does not say so comes to the start of the run."""
        if not joins and self.generation >= 0:
            return ConfigError("--join", f"not given, and the run that rank {rank} comes to is under way", "--join")
        if not joins:
            return b""  # who is there from the start is asked later: see ``admission``
        if self.session is None:
            return ConfigError("--join", "the run has not begun", "a run that is under way and has lost a rank")
        if rank in self._lines:
            return ConfigError("--join", f"rank {rank} is here already", "the number of a rank that is gone")
        return self._healing.judge(rank, account) or self.session

    def _hear(self, rank: int, line: Line) -> None:
        reason = "its connection closed"
        try:
            while True:
                line.socket.settimeout(self.patience)
                kind, body = line.receive()
                if kind == READY:
                    with self._change:
                        self._left[rank] = int.from_bytes(body, "little")
                        self._change.notify_all()
                elif kind == BYE:
                    return
        except TimeoutError:
            reason = f"silent for {self.patience:g} s"
        except (OSError, RunError) as error:
            reason = reason if isinstance(error, OSError) else str(error)
        with self._change:
            if self._lines.get(rank) is line and not self._closed:
                self._lose(rank, reason)

    def _lose(self, rank: int, reason: str) -> None:
        """Note that a rank is gone, and end the generation that it was in. Holds the lock."""
        self._lines.pop(rank).close()
        if rank in self.members and self.generation >= 0:
            self.losses.append(Loss(rank, reason))
            say(0, f"rank {rank} is gone: {reason}")
            # it calls back, which must not happen under the lock
            threading.Thread(target=self._end, args=(self.generation,), daemon=True).start()
        self._change.notify_all()

    def _send(self, rank: int, kind: int, body: bytes = b"") -> None:
        """Send a frame; that a rank cannot be reached will show when it is listened to."""
        try:
            self._lines[rank].send(kind, body)
        except OSError:
            self._lines[rank].socket.close()

    def _beat(self) -> None:
        while not self._closed:
            with self._change:
                for rank in list(self._lines):
                    self._send(rank, ALIVE)
            time.sleep(BEAT)


class RankLifeline:
    """The end of every other rank. ``on_over(generation)`` is called, in a thread of its own, when one ends, or all as rank 0 is gone."""

    def __init__(self, host: str, port: int, rank: int, healing: Healing, seconds: float) -> None:
        connection = socket.create_connection((host, port), timeout=seconds)
        self.rank, self.patience, self.joins = rank, healing.patience, healing.joins
        self.on_over: Callable[[int], None] = lambda _: None
        self.generation = -1
        account = healing.account if healing.joins else b""
        self._line, self.session = call(connection, healing.secret, account, rank, healing.joins)
        self._meeting = Meeting(-1, ())
        self._ended = -1  # the last generation that rank 0 has declared over
        self._gone = ""
        self._change = threading.Condition()
        self._closed = False
        for name, task in (("lifeline", self._hear), ("heartbeat", self._beat)):
            threading.Thread(target=task, name=name, daemon=True).start()

    def meet(self, seconds: float) -> Meeting:
        """Tell rank 0 that this rank has left its generation, and return the next one.

        Raises ``RunError`` when rank 0 is gone, has given this rank up, or does not call within ``seconds``.
        """
        left = self.generation if self.generation >= 0 else FRESH
        deadline = time.monotonic() + seconds
        try:
            self._line.send(READY, left.to_bytes(8, "little"))
        except OSError as error:
            raise RunError(f"rank {self.rank}: rank 0 is gone, or has given this rank up ({self._gone or error})") from error
        with self._change:
            while self._meeting.generation <= max(self.generation, self._ended) or self.rank not in self._meeting.members:
                if self._gone:
                    raise RunError(f"rank {self.rank}: rank 0 is gone, or has given this rank up ({self._gone})")
                if time.monotonic() > deadline:
                    raise RunError(f"rank {self.rank}: rank 0 has not called the ranks together within {seconds:g} s")
                self._change.wait(BEAT)
            self.generation = self._meeting.generation
            return self._meeting

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
                self._line.socket.settimeout(max(self.patience, FRAME_SECONDS))
                kind, body = self._line.receive()
                if kind == OVER:
                    self._ended = int.from_bytes(body, "little")
                    self.on_over(self._ended)
                elif kind == MEET:
                    generation, members = json.loads(body)
                    with self._change:
                        self._meeting = Meeting(generation, tuple(members))
                        self._change.notify_all()
                elif kind == BYE:
                    return
        except TimeoutError:
            self._leave(f"silent for {self.patience:g} s")
        except (OSError, RunError, ValueError) as error:
            self._leave(str(error))

    def _leave(self, reason: str) -> None:
        if self._closed:
            return
        with self._change:
            self._gone = reason
            self._change.notify_all()
        self.on_over(FRESH)

    def _beat(self) -> None:
        while not self._closed and not self._gone:
            try:
                self._line.send(ALIVE)
            except OSError:
                return
            time.sleep(BEAT)


Lifeline = RootLifeline | RankLifeline
