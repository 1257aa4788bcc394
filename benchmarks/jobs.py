"""Benchmarks that need ranks: this package's modules under torchrun or mpiexec, and a session whose clients train nothing."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

RANKS, CLIENTS = 5, 4
SECONDS = 600.0
MINILM = "{model_type: bert, num_hidden_layers: 6, hidden_size: 384, num_attention_heads: 12, intermediate_size: 1536, vocab_size: 30522}"


def on_ranks(transport: str, size: int, module: str, *arguments: str) -> list[dict[str, Any]]:
    """Run ``python -m module TRANSPORT FOLDER ARGUMENTS`` on ``size`` ranks; return what each left by ``tell``, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["-m", module, transport, folder, *arguments]
        if transport == "mpi":
            command = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(size), sys.executable, *own]
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *own]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        played = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1800, check=False)
        if played.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{played.stderr[-3000:]}")
        return [json.loads(_file(folder, rank).read_text(encoding="utf-8")) for rank in range(size)]


def tell(folder: str, rank: int, found: dict[str, Any]) -> None:
    """Leave what this rank has measured for ``on_ranks``."""
    _file(folder, rank).write_text(json.dumps(found), encoding="utf-8")


def _file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}.json"


def join(transport: str) -> Any:
    """Return this rank's communicator."""
    from slora_dist import memory
    from slora_dist.comm import connect
    from slora_dist.world import detect

    memory.keep()
    torch.set_num_threads(1)
    return connect(transport, detect(os.environ), os.environ, SECONDS, torch.device("cpu"))


def session(comm: Any, folder: str, overrides: Sequence[str], trained: bool = False) -> tuple[Any, Iterator[Any]]:
    """Return a session of the tiny settings with ``overrides``, and its rounds. Unless ``trained`` a client's update is a constant."""
    from slora_dist import client, settings
    from slora_dist.client import Update
    from slora_dist.job import Job

    held = Job(settings.load("configs/tiny.yaml", overrides), comm, Path(folder) / "run", torch.device("cpu")).prepare(resume=False)
    constants: dict[int, torch.Tensor] = {}

    def constant(net: Any, support: Any, start_N: torch.Tensor, documents: Any, *_: Any) -> Update:
        if support.numel not in constants:
            constants[support.numel] = torch.full((support.numel,), 1e-6)
        return Update(constants[support.numel], len(documents), 0.0, 0.0)

    if not trained:
        client.train = constant
    return held, held.play(None, None)
