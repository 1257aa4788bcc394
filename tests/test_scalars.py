"""What trackers get: tensorboard's files are read back; the others' calls are watched in their place, since they are large."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slora_dist.cli import main
from slora_dist.errors import ConfigError
from slora_dist.ledger import totals
from slora_dist.runfolder import RunFolder
from slora_dist.scalars import TRACKERS, Scalars, scalars
from tests.tiny import TINY

RECORD = {
    "round": 3, "train_loss": 1.5, "accuracy": None, "loss": None, "payload_bytes": {"up": 10, "down": 20}, "seconds": {"total": 2.0},
    "network": {"seconds": 9.0},
}  # fmt: skip


def test_what_was_not_measured_is_left_out() -> None:
    expected = {"train/loss": 1.5, "payload/up": 10, "payload/down": 20, "seconds/total": 2.0, "network/seconds": 9.0}
    assert scalars(RECORD) == expected
    assert "network/seconds" not in scalars(RECORD | {"network": None})


def test_tensorboard_reads_what_was_written(tiny_run: RunFolder, tmp_path: Path) -> None:
    assert main(["scalars", str(tiny_run.path), "--to", "tensorboard", "--out", str(tmp_path)]) == 0
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(tmp_path))
    accumulator.Reload()
    records = tiny_run.lines("metrics")
    read = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    assert [step for step, _ in read["train/loss"]] == [record["round"] for record in records]
    assert [value for _, value in read["test/accuracy"]] == pytest.approx([record["accuracy"] for record in records])
    moved = totals(tiny_run.lines("ledger"))
    assert read["payload/total"][-1][1] == moved["up"] + moved["down"]
    assert [value for _, value in read["seconds/total"]] == pytest.approx([record["seconds"]["total"] for record in records])


def test_a_place_that_is_no_folder_is_said(tiny_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["scalars", str(tiny_run.path), "--to", "tensorboard", "--out", str(tmp_path / "file")]) == 2
    assert "error: --out: " in capsys.readouterr().err


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_package_is_named(tracker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ConfigError, match=f"pip install {tracker}"):
        Scalars(tracker, "run", {}, tmp_path / "out")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_other_trackers_get_every_round(tracker: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: list[tuple[dict[str, Any], int]] = []
    ended: list[bool] = []

    def log(values: dict[str, Any], step: int) -> None:
        logged.append((values, step))

    module: Any = ModuleType(tracker)
    module.log = module.log_metrics = log
    module.init = module.start_run = lambda **_: SimpleNamespace(log=log, finish=lambda: ended.append(True))
    module.finish = module.end_run = lambda: ended.append(True)
    module.set_experiment = lambda name: None
    module.log_dict = lambda settings, name: None
    monkeypatch.setitem(sys.modules, tracker, module)
    target = Scalars(tracker, "run", {"a": 1}, tmp_path / "out")
    target.add(RECORD)
    target.add(RECORD | {"round": 4})
    target.close()
    assert [step for _, step in logged] == [3, 4] and [values["payload/total"] for values, _ in logged] == [30, 60] and ended == [True]


def test_training_hands_every_round_over_as_it_ends(tmp_path: Path) -> None:
    out, few = tmp_path / "run", ["method.name=fft", "method.dense.rounds=2", "clients.epochs=1", "data.limit=80", "data.test_limit=40"]
    assert main(["train", str(TINY), *few, "--out", str(out), "--track", "tensorboard", "--stop-after", "1"]) == 0
    assert main(["train", "--resume", str(out), "--track", "tensorboard"]) == 0
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(out / "tensorboard"))
    accumulator.Reload()
    moved = totals(RunFolder(out).lines("ledger"))
    sent = [event.value for event in accumulator.Scalars("payload/total")]
    assert sent == [(moved["up"] + moved["down"]) / 2, moved["up"] + moved["down"]]
