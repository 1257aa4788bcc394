"""Rank 0's end of the lifeline: it hears who lives, declares a generation over, and calls the ranks together. Protocol: ``lifeline.py``."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from slora_dist.comm.lifeline import ALIVE, BEAT, BYE, GENERATION_BYTES, MEET, OVER, READY, REFUSED, Healing, Loss, Meeting, RankLifeline
from slora_dist.comm.line import Line, answer, await_sign, reason_of
from slora_dist.errors import ConfigError, RunError
from slora_dist.log import say

PENDING = 256  # ranks that may introduce themselves at the same time: the system lets others wait


class RootLifeline:
    """Rank 0's end: it watches all others. ``on_over(generation)`` is called, in a thread of its own, when one ends."""

    joins = False

    def __init__(self, listener: socket.socket, size: int, healing: Healing) -> None:
        self.size, self.patience, self._healing = size, healing.patience, healing
        self.on_over: Callable[[int], None] = lambda _: None
        self.generation, self.members = -1, tuple(range(size))
        self.losses: list[Loss] = []
        self.session: bytes | None = None  # the key of the run's session, once it has begun
        self._examine: Callable[[int, bytes], ConfigError | None] = lambda *_: None
        self._lines: dict[int, Line] = {}
        self._joining: set[int] = set()  # those of the lines that are in no generation yet
        self._joined: set[int] = set()  # those that have come into one under way
        self._left: dict[int, int] = {}  # the generation that each rank has left: it is ready for the next one
        self._change = threading.Condition()
        self._over = False  # whether the present generation is
        self._closed = False
        self._listener, self._pending = listener, threading.BoundedSemaphore(PENDING)
        self.port: int = self._listener.getsockname()[1]
        for name, task in (("lifeline", self._listen), ("heartbeat", self._beat)):
            threading.Thread(target=task, name=name, daemon=True).start()

    def begin(self, session: bytes, holdings: bytes, judge: Callable[[int, bytes], ConfigError | None]) -> None:
        """Let ranks join from now on: they get the key of the ``session``. ``judge(rank, holdings)`` says why one may not after all, which
        has loaded something else than this rank.
        """
        self._examine, self.session = judge, session

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
            self.members = (0, *sorted(self._lines.keys() & self._left.keys()))
            self._joined |= self._joining & set(self.members)
            self._joining -= self._joined
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
        """Return the ranks that are in no generation and ready for the next one."""
        with self._change:
            return sorted(self._joining & self._left.keys())

    def refuse(self, rank: int, error: ConfigError) -> bool:
        """Send a rank away that has joined, and say why; return whether it had, or was there from the start and stays."""
        with self._change:
            if rank not in self._joined:
                return False
            if rank in self._lines:
                self._send(rank, REFUSED, reason_of(error))
                self._lose(rank, str(error))
            return True

    def check(self) -> None:
        """Do nothing: this is rank 0."""

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
        return [rank for rank in self._lines if rank not in self._joining and self._left.get(rank, -1) < self.generation]

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
            self._pending.acquire()
            try:
                connection, address = self._listener.accept()
            except OSError:  # closed, as the run has ended; or no descriptor is left, or who called has gone
                self._pending.release()
                if self._closed:
                    return
                time.sleep(BEAT)
                continue
            threading.Thread(target=self._answer, args=(connection, address[0]), daemon=True).start()

    def _answer(self, connection: socket.socket, address: str) -> None:
        """Take in a rank that calls, and read what it says until it is gone."""
        try:
            line, rank, joins = answer(connection, self._healing.secret, self.size, self._judge)
        except (OSError, RunError) as error:
            say(0, f"refused a connection from {address}: {error}")
            connection.close()
            return
        finally:
            self._pending.release()
        with self._change:
            if self._closed:  # the run has ended while it introduced itself
                with suppress(OSError):
                    line.send(BYE)
                line.close()
                return
            if rank in self._lines:
                say(0, f"refused a connection from {address}: rank {rank} is here already")
                connection.close()
                return
            self._lines[rank] = line
            self._left.pop(rank, None)
            if joins:
                self._joining.add(rank)
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
                await_sign(line.socket, self.patience)
                kind, body = line.receive()
                if kind == READY:
                    self._ready(rank, line, body)
                elif kind == BYE:
                    self._let_go(rank, line)
                    break
        except TimeoutError:
            reason = f"silent for {self.patience:g} s"
        except (OSError, RunError, ValueError) as error:  # ValueError: a line that was closed here
            reason = str(error) if isinstance(error, RunError) else reason
        finally:
            with self._change:
                if self._lines.get(rank) is line and not self._closed:
                    self._lose(rank, reason)
            line.close()

    def _ready(self, rank: int, line: Line, body: bytes) -> None:
        """Note that a rank is ready for the next generation, unless it joins and has loaded something else."""
        left, holdings = int.from_bytes(body[:GENERATION_BYTES], "little"), body[GENERATION_BYTES:]
        refusal = self._examine(rank, holdings) if rank in self._joining else None
        if refusal is None:
            with self._change:
                if self._lines.get(rank) is line:
                    self._left[rank] = left
                    self._change.notify_all()
            return
        say(0, f"refused rank {rank}: {refusal}")
        self._let_go(rank, line)  # before it is told: it may come again at once
        line.send(REFUSED, reason_of(refusal))

    def _let_go(self, rank: int, line: Line) -> None:
        """Forget a rank that leaves, or that may not stay: nobody waits for it any more, and its end is no loss."""
        with self._change:
            if self._lines.get(rank) is line and not self._closed:
                del self._lines[rank]
                self._joining.discard(rank)
                self._change.notify_all()

    def _lose(self, rank: int, reason: str) -> None:
        """Note that a rank is gone, and end the generation that it was in. Holds the lock."""
        self._lines.pop(rank).close()
        joining = rank in self._joining
        self._joining.discard(rank)
        if rank in self.members and self.generation >= 0 and not joining:
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


Lifeline = RootLifeline | RankLifeline
