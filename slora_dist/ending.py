"""Where a rank is, and how others learn of its end.

A rank that fails says so itself. One that is killed cannot: a small process that it forked at its start, its witness, says it instead.
The survivors, which their launcher then ends by SIGTERM, tell what they were doing. A job's time that is up comes as SIGTERM, too, or as
SIGUSR1 where SLURM was asked for a warning (``--signal``).

A launcher that ends a job does not always pass on what its ranks print then (srun drops what reaches it after a forced end): last words
stand in the run folder, too, a file for each rank.
"""

import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from slora_dist.log import say

LAST_WORDS = "ended-{rank}.log"  # in the run folder, where a resumed run adds to it
LEAVE = (signal.SIGTERM, signal.SIGUSR1)  # leave now; the exit code is 128 + the signal's number, as a shell has it
PAGE = 256  # bytes of a place in words


@dataclass
class Where:
    """The place in the run, for messages; with a ``page`` (memory shared with the witness) every change is written there, too."""

    phase: str = "start"
    round: int = 0
    operation: str = "preparation"
    folder: Path | None = None  # of the run: last words are written there, too
    page: mmap.mmap | None = None
    finish: Callable[[], None] = lambda: None  # what must be done before this process may end: the checkpoint that is being written

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        page = self.__dict__.get("page")
        if page is not None:
            page[:PAGE] = str(self).encode()[:PAGE].ljust(PAGE)

    def __str__(self) -> str:
        return f"phase {self.phase}, round {self.round}, {self.operation}"


def last_words(rank: int, where: Where, text: str) -> None:
    """Print one line, and add it to ``LAST_WORDS`` in the run folder where that can be done."""
    say(rank, text)
    if where.folder and where.folder.is_dir():
        with suppress(OSError), (where.folder / LAST_WORDS.format(rank=rank)).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


class Witness:
    """A process that outlives this one by a moment, and says where it was if it died without a word."""

    def __init__(self, rank: int, where: Where) -> None:
        """Fork it. Call this before other threads are started and before memory has grown."""
        where.page = mmap.mmap(-1, PAGE)
        reader, self._writer = os.pipe()
        if os.fork() == 0:
            _testify(rank, where, reader)
        os.close(reader)

    def dismiss(self) -> None:
        """Let it go silently: this rank ends in its own words."""
        with suppress(BrokenPipeError):  # somebody has killed the witness, too
            os.write(self._writer, b"!")


def speak_when_ended(rank: int, where: Where, witness: Witness | None) -> None:
    """On one of ``LEAVE`` print one line that says where this rank was, and leave once the checkpoint in hand is written.

    A thread waits for the signal: Python's own handlers do not run while the main thread waits inside a transport.
    Call it before other threads are started, so that none of them takes the signal. A world of one has no ``witness``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE)

    def wait() -> None:
        number = signal.Signals(signal.sigwait(LEAVE))
        cause = ""
        if witness:
            witness.dismiss()
            cause = ": another rank may have died, or the job's time is up"
        last_words(rank, where, f"ended by {number.name} in {where}{cause}; --resume goes on")
        where.finish()
        os._exit(128 + number)

    threading.Thread(target=wait, name="ending", daemon=True).start()


def _testify(rank: int, where: Where, reader: int) -> NoReturn:
    """Wait for the rank's end: its pipe closes when it is gone, whatever killed it."""
    assert where.page
    os.setsid()  # a signal for the rank's group is not for its witness
    for number in (*LEAVE, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep = {2, reader}
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:  # the rank's sockets and pipes must close when it dies
        if fd not in keep:
            with suppress(OSError):  # the listing's own is gone already
                os.close(fd)
    if not os.read(reader, 1):
        last_words(rank, where, f"died in {where.page[:PAGE].decode(errors='replace').strip()}: killed, or out of memory?")
    sys.stderr.flush()
    os._exit(0)
