"""A rank that does not belong: ``python -m tests.impostor KIND RANK train ...`` is the program itself on all ranks but RANK."""

import os
import sys

import slora_dist
from slora_dist.cli import main
from slora_dist.world import detect

if __name__ == "__main__":
    kind, which, *arguments = sys.argv[1:]
    if detect(os.environ).rank == int(which):
        if kind == "secret":
            del os.environ["SLORA_DIST_SECRET"]
        elif kind == "version":
            slora_dist.__version__ = "0.0.9"
        elif kind == "config":
            arguments += ["method.sparse.lr=0.125"]
    sys.exit(main(arguments))
