"""Ranks without an agent, as ``launch/ranks.sh`` and srun start them, but forked from one process that has imported everything.

A rank may be given a saboteur: a function that is called in it before the run begins, and that patches what it is to spoil.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from drill import processes

Saboteur = Callable[[], None]
STEP = 0.02  # seconds between two looks


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def until(condition: Callable[[], bool], seconds: float, what: str, log: Path) -> None:
    """Return as soon as ``condition`` holds; raises ``TimeoutError``, with the end of ``log``, after ``seconds``."""
    try:
        processes.until(condition, what, seconds, STEP)
    except TimeoutError as error:
        raise TimeoutError(f"{error}\n{log.read_text(encoding='utf-8')[-4000:]}") from None


class Job(Protocol):
    """Ranks that run, wherever and however they were started."""

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Return as soon as ``condition`` holds; raises ``TimeoutError`` after ``seconds``."""


class Ranks:
    """The processes of one job. ``arguments`` are those of ``slora-dist``; output goes to ``log``."""

    def __init__(self, size: int, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.size, self.arguments, self.log = size, list(arguments), log
        self.world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(environ or {})}
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in (signal.SIGCONT, signal.SIGKILL):
            self.send(number, *self.pids)
        for rank in list(self.pids):
            self._reap(rank, 0)

    def start(self, saboteurs: Mapping[int, Saboteur] | None = None) -> "Ranks":
        """Start all ranks."""
        for rank in range(self.size):
            self.start_one(rank, (saboteurs or {}).get(rank))
        return self

    def start_one(self, rank: int, saboteur: Saboteur | None = None, *more: str) -> None:
        """Start one rank, with ``more`` arguments."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._play(rank, saboteur, more)
        self.pids[rank] = pid
        self.codes.pop(rank, None)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to ranks."""
        for rank in ranks:
            if rank in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def wait(self, seconds: float, *ranks: int) -> dict[int, int]:
        """Return the exit codes of ``ranks`` (default: all), a signal's number as a negative one; raises ``TimeoutError``: a hang."""
        wanted = ranks or tuple(range(self.size))
        self.until(lambda: all(rank in self.codes for rank in wanted), seconds, f"ranks {wanted} to end")
        return {rank: self.codes[rank] for rank in wanted}

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Return as soon as ``condition`` holds; raises ``TimeoutError`` after ``seconds``."""

        def holds() -> bool:
            for rank in list(self.pids):
                self._reap(rank, os.WNOHANG)
            return condition()

        until(holds, seconds, what, self.log)

    def _reap(self, rank: int, options: int) -> None:
        pid, status = os.waitpid(self.pids[rank], options)
        if pid:
            del self.pids[rank]
            self.codes[rank] = os.waitstatus_to_exitcode(status)

    def _play(self, rank: int, saboteur: Saboteur | None, more: Sequence[str]) -> None:
        code = 1
        try:
            with self.log.open("a", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(self.world, RANK=str(rank), LOCAL_RANK=str(rank))
            if saboteur:
                saboteur()
            from slora_dist.cli import main

            code = main([*self.arguments, *more])
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def rounds(run: Path) -> int:
    """Return the number of finished rounds of a run."""
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def pids(folder: Path) -> dict[int, int]:
    """Return {rank: process} of the ranks that have left their number in a folder."""
    return {int(file.name.removeprefix("rank-")): int(file.read_text(encoding="ascii")) for file in folder.glob("rank-*")}
