"""A rank that does not belong, does not come, says nothing, dies, or is asked to leave.

``python -m tests.impostor KIND RANK train ...`` is the program itself on all ranks but RANK.
"""

import itertools
import os
import signal
import sys
from typing import Any

import slora_dist
from slora_dist.cli import main
from slora_dist.world import detect

TRAININGS = 5  # of a rank that dies in the one after them


def die_while_training(number: signal.Signals) -> None:
    from slora_dist import client

    train, count = client.train, itertools.count()

    def mortal(*args: Any) -> Any:
        if next(count) == TRAININGS:
            os.kill(os.getpid(), number)
            signal.pause()
        return train(*args)

    client.train = mortal


def keep_silent() -> None:
    """Connect, and say nothing until somebody ends this process."""
    from slora_dist import admission

    admission._admit = lambda *_: signal.pause()  # type: ignore[assignment]


def hurry() -> None:
    """Wait for a silent rank, or in MPI_Init for an absent one, no longer than a test may."""
    from slora_dist import admission
    from slora_dist.comm import mpi_comm

    admission.INIT_SECONDS = mpi_comm.INIT_SECONDS = 2.0


if __name__ == "__main__":
    kind, which, *arguments = sys.argv[1:]
    if kind in ("silent", "absent"):
        hurry()
    if detect(os.environ).rank == int(which):
        if kind == "secret":
            del os.environ["SLORA_DIST_SECRET"]
        elif kind == "version":
            slora_dist.__version__ = "0.0.9"
        elif kind == "config":
            arguments += ["method.sparse.lr=0.125"]
        elif kind == "absent":
            signal.pause()
        elif kind == "silent":
            keep_silent()
        elif kind == "killed" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            die_while_training(signal.SIGKILL)
        elif kind == "asked":
            die_while_training(signal.SIGTERM)
    sys.exit(main(arguments))
