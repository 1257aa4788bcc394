"""torchrun starts its ranks anew when one has died, and the run goes on from its checkpoint: to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slora_dist.cli import main
from slora_dist.errors import ConfigError
from slora_dist.runfolder import RunFolder
from tests.tiny import ROOT, SHORT, TINY, run, same


@pytest.mark.launcher
def test_a_run_whose_rank_was_killed_ends_in_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*torchrun, "-m", "tests.impostor", "killed", "1", "train", str(TINY), *SHORT, "--out", str(tmp_path / "run")]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "SLORA_DIST_SECRET": "x" * 32}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "[rank 1] died in phase sparse, round 2, training of client " in ended.stderr
    folder = RunFolder(tmp_path / "run")
    starts = sum(line["kind"] == "verdict" and line["rank"] == 0 for line in folder.lines("ledger"))
    assert starts == 2, "both lives have left their admission"
    assert same(folder, run(tmp_path / "undisturbed", *SHORT))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one that torchrun has started anew: its agent is the parent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def test_a_start_that_is_refused_does_not_stand_in_the_way_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a tracker that is not there, after the folder was made; a run that was there before stays."""
    command = ["train", str(TINY), *SHORT, "--out", str(tmp_path / "run"), "--stop-after", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("slora_dist.job.Scalars", lambda *_: (_ for _ in ()).throw(ConfigError("--track", "not installed", "another")))
        assert main([*command, "--track", "tensorboard"]) == 2 and not (tmp_path / "run").exists()
        assert main(command) == 0
        assert main(["train", "--resume", str(tmp_path / "run"), "--track", "tensorboard"]) == 2
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.usefixtures("started")
def test_a_restart_goes_on_only_with_the_same_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", str(TINY), *SHORT, *out, "--stop-after", "1"]) == 0, "it died before it had a folder"
    assert main(["train", str(TINY), *SHORT, "run.seed=5", *out]) == 2
    assert "error: run.seed: 5, but the run that is resumed has 0" in capfd.readouterr().err
    assert main(["train", str(TINY), *SHORT, *out]) == 0
    assert [line["round"] for line in RunFolder(tmp_path / "run").lines("metrics")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("started")
def test_a_restart_does_not_go_on_with_a_run_that_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its first life was refused, and torchrun starts it again: neither a half-finished run nor a finished one is its own."""
    again = ["train", str(TINY), *SHORT, "--out", str(tmp_path / "run")]
    run(tmp_path / "run", *SHORT, stop_after=1)
    assert main(again) == 2 and "error: --out: " in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("slora_dist.cli.launch", lambda environ: "another")
        assert main(["train", str(TINY), *SHORT, "--out", str(tmp_path / "other"), "--stop-after", "1"]) == 0
    assert main([*again[:-1], str(tmp_path / "other")]) == 2 and "holds a run already" in capfd.readouterr().err
    assert len(RunFolder(tmp_path / "run").lines("metrics")) == len(RunFolder(tmp_path / "other").lines("metrics")) == 1
