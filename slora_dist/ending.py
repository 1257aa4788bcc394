"""Where a rank is, and what it says when its launcher ends it: torchrun and srun send SIGTERM to all when one rank has died."""

import os
import signal
import threading
from dataclasses import dataclass

from slora_dist.log import say

SIGTERM_CODE = 128 + signal.SIGTERM


@dataclass
class Where:
    """The place in the run, for messages."""

    phase: str = "start"
    round: int = 0
    operation: str = "preparation"

    def __str__(self) -> str:
        return f"phase {self.phase}, round {self.round}, {self.operation}"


def speak_when_ended(rank: int, where: Where) -> None:
    """On SIGTERM print one line that says where this rank was, and leave at once; what was finished is in the last checkpoint.

    A thread waits for the signal: Python's own handlers do not run while the main thread waits inside a transport.
    Call it before other threads are started, so that none of them takes the signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        say(rank, f"ended by SIGTERM in {where}: another rank may have died, or the job's time is up; --resume goes on")
        os._exit(SIGTERM_CODE)

    threading.Thread(target=wait, name="ending", daemon=True).start()
