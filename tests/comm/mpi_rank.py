"""One rank under mpiexec: ``python -m tests.comm.mpi_rank FOLDER TIMEOUT SCENARIO...``."""

import os
import sys
from pathlib import Path

import torch

from slora_dist.comm.mpi_comm import MpiComm
from slora_dist.world import detect
from tests.comm.scenarios import BUCKET, MAX_MESSAGE, play

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, timeout, *names = sys.argv[1:]
    play(MpiComm(detect(os.environ), float(timeout), BUCKET, MAX_MESSAGE), names, Path(folder))
