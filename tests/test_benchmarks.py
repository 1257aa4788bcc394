"""The table in docs/performance.md is the one of results.json, and the model of the cost at scale does what its formulas say."""

import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.common import Row, interleave, ratio
from benchmarks.jobs import session
from benchmarks.scale_model import MODELS, Constants, crossing, parts
from slora_dist import client
from slora_dist.comm.alone import Alone


def test_the_page_shows_the_results() -> None:
    rows = json.loads(run.RESULTS.read_text(encoding="utf-8"))
    assert all({"name", "ratio", "target", "limit", "runs"} <= set(row) for row in rows)
    shown = run.PAGE.read_text(encoding="utf-8").partition(run.BEGIN)[2].partition(run.END)[0]
    assert shown.strip() == run.table(rows)


def test_contenders_are_measured_in_turn_and_compared_run_by_run() -> None:
    played: list[str] = []
    ticks = iter([0.0, 9.0, 9.0, 9.0, 0.0, 1.0, 0.0, 2.0, 0.0, 6.0, 0.0, 3.0, 0.0, 5.0, 0.0, 4.0])
    seconds = interleave({name: lambda name=name: played.append(name) for name in ("a", "b")}, 3, lambda: next(ticks))  # type: ignore[misc]
    assert played == ["a", "b"] * 4 and seconds == {"a": [1.0, 6.0, 5.0], "b": [2.0, 3.0, 4.0]}
    assert ratio(seconds["a"], seconds["b"]) == 1.25  # of 0.5, 2 and 1.25
    assert Row("x", 1.0, 1.0, 0.0, 3).met and not Row("x", 1.1, 1.0, 0.0, 3).met


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("method", ["full", "sparse", "LoRA"])
def test_at_the_crossing_bytes_take_as_long_as_training(model, method) -> None:  # type: ignore[no-untyped-def]
    known = Constants({"full": 4e-11, "sparse": 3e-11, "LoRA": 3e-11}, 7e9, 1e9, 1e-3, 7e-7)
    part = parts(model, method, 100, crossing(model, method, 100, 10.0, known), 10.0, known)
    assert part["broadcast"] + part["upload"] == pytest.approx(part["train"])


def test_a_round_is_played_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "train", client.train)  # so that it is put back: the session replaces it
    record = next(session(Alone(), str(tmp_path), ("method.name=lora", "method.lowrank.rounds=1"))[1])
    assert record["left_out"] == {} and record["train_loss"] == 0
