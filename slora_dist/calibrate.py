"""How long this machine takes for the local work of a run: ``slora-dist doctor CONFIG`` measures it, ``timing`` predicts from it.

It is a rehearsal: a few rounds of every phase of the run itself on all of its ranks, since ranks on one host share cores and memory.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from slora_dist import settings
from slora_dist.comm.base import Communicator
from slora_dist.config import PRESETS, Config
from slora_dist.job import Job
from slora_dist.runfolder import RunFolder
from slora_dist.timing import step_settings

ROUNDS = 3  # of each phase; the first warms up and does not count
TEST_DOCUMENTS = 8


def rehearse(config: Config, comm: Communicator, device: torch.device) -> dict[str, Any] | None:
    """Return on rank 0 ``{documents: of each client, phases: {phase: {step_seconds, server_seconds}}, settings}``; every rank calls it.

    ``settings`` are those that a client's training depends on. ``step_seconds`` is the median of a client's training over its steps,
    ``server_seconds`` what rank 0 needs in a round besides waiting, moving and evaluating. Raises ``ConfigError`` as the run would.
    """
    with tempfile.TemporaryDirectory(prefix="slora-dist-") as scratch:
        job = Job(rehearsal(config), comm, Path(scratch) / "run", device)
        session = job.prepare(resume=False)
        for _ in session.play(None, None):
            pass
        if comm.rank:
            return None
        metrics = job.folder.lines("metrics")
        usual = statistics.median(line["num_examples"] // (len(line["clients"]) - len(line["left_out"])) for line in metrics)
        documents = session.seat.federation.sizes or [int(usual)] * config.clients.count
        phases = _phases(config, job.folder, documents, comm.size)
        return {"documents": documents, "phases": phases, "settings": step_settings(config)}


def rehearsal(config: Config) -> Config:
    """Return the settings of the run's rehearsal: ``ROUNDS`` of every phase, and what takes time besides left out."""
    tree = config.model_dump()
    tree["network"] = {}
    tree["comm"]["encrypt"] = False  # the communicator seals already
    tree["server"]["eval_every"] = tree["clients"]["eval_every"] = 0
    tree["data"]["test_limit"] = min(TEST_DOCUMENTS, config.data.test_limit or TEST_DOCUMENTS)
    sections = {kind for preset in PRESETS.values() for kind in preset}
    for phase in [*(tree["method"][kind] for kind in sections), *tree["method"]["phases"]]:
        phase["rounds"] = ROUNDS
    return settings.validate(tree)


def _phases(config: Config, folder: RunFolder, documents: list[int], size: int) -> dict[str, dict[str, float]]:
    metrics, spans = folder.lines("metrics"), folder.lines("timeline")
    phases = {}
    for name in dict.fromkeys(line["phase"] for line in metrics):
        rounds = [line for line in metrics if line["phase"] == name][1:]
        warm = {line["round"] for line in rounds}
        steps = [
            span["seconds"] / config.steps(documents[span["client"]]) for span in spans if span["what"] == "train" and span["round"] in warm
        ]
        own = [_own(line["seconds"], size) for line in rounds]
        phases[name] = {"step_seconds": statistics.median(steps), "server_seconds": statistics.median(own)}
    return phases


def _own(seconds: dict[str, float], size: int) -> float:
    """Return what rank 0 did in a round besides communicating and evaluating; in a world of one it also trains, which is told apart."""
    return seconds["total"] - seconds["communicate"] - seconds["evaluate"] - (seconds["train"] if size == 1 else 0.0)
