"""Every file of configs/aggregation plays to its end, is audited without a fault, and ends in the same bits when it is resumed."""

from pathlib import Path

import pytest
import torch

from slora_dist import settings
from slora_dist.audit.checks import audit
from slora_dist.comm.alone import Alone
from slora_dist.job import Job
from slora_dist.runfolder import RunFolder
from tests.tiny import ROOT, same

FILES = sorted((ROOT / "configs" / "aggregation").glob("*.yaml"))
SHORT = ("method.sparse.rounds=1", "method.lowrank.rounds=3", "clients.epochs=1", "data.limit=48", "data.test_limit=16")


def play(file: Path, out: Path, stop_after: int | None = None, resume: bool = False) -> RunFolder:
    folder = RunFolder(out)
    config = folder.config() if resume else settings.load(file, SHORT)
    Job(config, Alone(), out, torch.device("cpu")).run(resume, stop_after)
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_plays_and_can_be_resumed(file: Path, tmp_path: Path) -> None:
    straight = play(file, tmp_path / "straight")
    play(file, tmp_path / "broken", stop_after=3)
    broken = play(file, tmp_path / "broken", resume=True)
    assert same(straight, broken)
    assert [check.name for folder in (straight, broken) for check in audit(folder) if check.faults] == []


def test_there_is_a_file_for_every_rule_and_option() -> None:
    assert len(FILES) >= 20
