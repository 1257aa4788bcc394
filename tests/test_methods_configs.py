"""Every file of ``configs/methods`` and its kin plays to the end and leaves something that can be loaded."""

from pathlib import Path

import pytest
import torch

from slora_dist import adapters, settings
from slora_dist.audit.checks import audit
from slora_dist.comm.alone import Alone
from slora_dist.data.federation import Federation
from slora_dist.evaluate import evaluate
from slora_dist.job import Job
from slora_dist.runfolder import RunFolder
from tests.tiny import ROOT

FILES = sorted(path for room in ("methods", "wire") for path in (ROOT / "configs" / room).glob("*.yaml"))
SHORT = ("clients.per_round=2", "clients.epochs=1", "data.limit=60", "data.test_limit=30")


def rounds_of_each_phase(path: Path, count: int) -> list[str]:
    """Overrides that shorten every phase."""
    method = settings.load(path).method
    if method.phases:
        return [f"method.phases.{at}.rounds={count}" for at in range(len(method.phases))]
    return [f"method.{phase.kind}.rounds={count}" for phase in method.resolved()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_plays_to_the_end(path: Path, tmp_path: Path) -> None:
    """The accounts agree line by line, and what is loaded again scores what the summary says."""
    config = settings.load(path, [*SHORT, *rounds_of_each_phase(path, 2)])
    Job(config, Alone(), tmp_path, torch.device("cpu")).run(False, None)
    folder = RunFolder(tmp_path)
    assert [fault for check in audit(folder) for fault in check.faults or ()] == []
    score = evaluate(adapters.load(folder.adapter), Federation(config, None).test(), 0)
    assert score.accuracy == folder.summary()["accuracy"]
    assert score.loss == pytest.approx(folder.summary()["loss"], rel=1e-4)
