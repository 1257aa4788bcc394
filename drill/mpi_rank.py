"""One rank of an MPI job: ``python -m drill.mpi_rank FOLDER ARGUMENTS...`` under mpiexec does what ``slora-dist ARGUMENTS...`` does.

It leaves the number of its process in FOLDER, and finds there what is to be done to it: FOLDER/sabotage has {rank: a call that returns a
saboteur}.
"""

import os
import pickle
import sys
from pathlib import Path

from slora_dist.cli import main as play
from slora_dist.world import detect


def main() -> int:
    """Be sabotaged, and play."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    rank = detect(os.environ).rank
    (folder / f"rank-{rank}").write_text(str(os.getpid()), encoding="ascii")
    plots = pickle.loads((folder / "sabotage").read_bytes())  # of the drill that started this job
    if rank in plots:
        plots[rank]()()
    return play(arguments)


if __name__ == "__main__":
    sys.exit(main())
