"""A rank that does not belong, or dies: ``python -m tests.impostor KIND RANK train ...`` is the program itself on all ranks but RANK."""

import itertools
import os
import signal
import sys
from typing import Any

import slora_dist
from slora_dist.cli import main
from slora_dist.world import detect

TRAININGS = 5  # of a rank that dies in the one after them


def die_while_training() -> None:
    from slora_dist import client

    train, count = client.train, itertools.count()

    def mortal(*args: Any) -> Any:
        if next(count) == TRAININGS:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(*args)

    client.train = mortal


if __name__ == "__main__":
    kind, which, *arguments = sys.argv[1:]
    if detect(os.environ).rank == int(which):
        if kind == "secret":
            del os.environ["SLORA_DIST_SECRET"]
        elif kind == "version":
            slora_dist.__version__ = "0.0.9"
        elif kind == "config":
            arguments += ["method.sparse.lr=0.125"]
        elif kind == "killed" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            die_while_training()
    sys.exit(main(arguments))
