"""Tiny runs in this process, as a world of one."""

import json
from pathlib import Path
from typing import Any

import torch

from slora_dist import settings
from slora_dist.comm.alone import Alone
from slora_dist.comm.base import Communicator
from slora_dist.config import Config
from slora_dist.job import Job
from slora_dist.runfolder import RunFolder

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
SHORT = (  # two phases of two rounds with little training
    "method.sparse.rounds=2", "method.lowrank.rounds=2", "clients.epochs=1", "clients.per_round=3", "data.limit=80", "data.test_limit=40",
)  # fmt: skip


def tiny(*overrides: str) -> Config:
    """Return the tiny settings with ``overrides``."""
    return settings.load(TINY, overrides)


def run(out: Path, *overrides: str, resume: bool = False, stop_after: int | None = None, comm: Communicator | None = None) -> RunFolder:
    """Play the tiny run into ``out``; a run that is resumed has its settings from there."""
    folder = RunFolder(out)
    chosen = folder.config() if resume else tiny(*overrides)
    Job(chosen, comm or Alone(), out, torch.device("cpu")).run(resume, stop_after)
    return folder


def metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Return what a round's record says, but for its seconds and the transport."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "transport")} for line in folder.lines("metrics")]


def tensors(folder: RunFolder) -> dict[str, bytes]:
    """Return every file of weights of a run's adapter, byte for byte."""
    return {str(path.relative_to(folder.adapter)): path.read_bytes() for path in sorted(folder.adapter.rglob("*.safetensors"))}


def same(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs ended in the same bits, and said the same on the way."""
    switches = [json.dumps(folder.summary()["switch"]) for folder in (one, other)]
    return bool(tensors(one)) and tensors(one) == tensors(other) and metrics(one) == metrics(other) and switches[0] == switches[1]
