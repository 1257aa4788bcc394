"""The clock of a plan: closed forms on a machine that this test made up, and a rehearsal that measures a real one."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from slora_dist.calibrate import rehearsal, rehearse
from slora_dist.cli import main
from slora_dist.comm.alone import Alone
from slora_dist.config import PRESETS
from slora_dist.data.federation import class_names
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel, shell
from slora_dist.timing import NOTES_BYTES, PARTS, predict, read_machine, step_settings
from slora_dist.wire import HEADER_BYTES
from tests.tiny import TINY, tiny

BYTE = 1e-6  # seconds of a byte in a copy, of which both verbs take three one after the other on four ranks


def machine(size: int = 4, **phases: dict[str, float]) -> dict[str, Any]:
    rows = [
        {"verb": verb, "bytes": nbytes, "seconds": (own := factor * (0.5 + nbytes * BYTE)), "own_seconds": own * held}
        for verb, factor, held in (("broadcast", 3, 2 / 3), ("gather", 3, 1), ("reduce", 2, 1))
        for nbytes in (0, 10**6)
    ]
    measured = step_settings(fft()[0])
    return {"world": {"size": size}, "verbs": rows, "documents": [40] * 6, "phases": phases, "settings": measured}


def fft(*overrides: str) -> tuple[Any, TaskModel, int]:
    config = tiny(
        "method.name=fft", "method.dense.rounds=3", "clients.per_round=3", "clients.epochs=2", "clients.batch_size=16", *overrides
    )
    classifier = shell(config.model, class_names(config))
    return config, classifier, 4 * sum(parameter.numel() for parameter in classifier.net.parameters())


LOCAL = {"step_seconds": 2.0, "server_seconds": 0.25}


def test_a_round_is_the_sum_of_its_parts() -> None:
    """Nothing is held by kernels here: ranks 1 and 3 go on after three copies, rank 2 after two, and rank 0 reads rank 1's update first."""
    config, classifier, nbytes = fft()
    parts = predict(config, classifier, machine(dense=LOCAL))["dense"]
    copy, message = 0.5 + nbytes * BYTE, 0.5 + (nbytes + HEADER_BYTES) * BYTE
    assert parts["broadcast"] == pytest.approx(3 * copy)
    assert parts["train"] == 2 * 3 * 2.0, "two epochs of three batches"
    assert parts["upload"] == pytest.approx(3 * message - copy, rel=1e-5), "rank 2's was there a copy earlier, before rank 1's"
    assert parts["control"] == pytest.approx(3 * (0.5 + NOTES_BYTES * BYTE)) and parts["server"] == 0.25
    assert parts["round"] == pytest.approx(sum(parts[part] for part in PARTS))


def test_what_kernels_hold_travels_while_ranks_go_on() -> None:
    config, classifier, nbytes = fft()
    holding = machine(dense=LOCAL)
    for row in holding["verbs"]:
        row |= {"own_seconds": 0.0, "seconds": row["seconds"] * (2 / 3 if row["verb"] == "broadcast" else 1)}
    parts = predict(config, classifier, holding)["dense"]
    assert parts["broadcast"] == pytest.approx(2 * (0.5 + nbytes * BYTE)), "one copy after the other: rank 3 has its own when rank 2 has"


def test_uploads_hide_behind_the_training_of_later_clients() -> None:
    config, classifier, nbytes = fft()
    parts = predict(config, classifier, machine(size=2, dense=LOCAL))["dense"]
    assert parts["train"] == 3 * 12.0, "one rank trains three clients"
    assert parts["upload"] == pytest.approx(3 * (0.5 + (nbytes + HEADER_BYTES) * BYTE)), "only the last is still to come"


def test_a_reduce_is_told_as_one() -> None:
    config, classifier, nbytes = fft("comm.collective=reduce")
    assert predict(config, classifier, machine(dense=LOCAL))["dense"]["upload"] == pytest.approx(2 * (0.5 + nbytes * BYTE))


def test_an_exact_sum_waits_for_all_and_agrees_first() -> None:
    """All have trained when the scale is agreed on, then the keys; then rank 0 reads three messages."""
    config, classifier, nbytes = fft("comm.sum=exact", "comm.secure=true")
    parts = predict(config, classifier, machine(dense=LOCAL))["dense"]
    agreed = sum(3 * (0.5 + count * BYTE) for count in (8, 8, 32, 96))
    assert parts["upload"] == pytest.approx(agreed + 3 * (0.5 + (nbytes + HEADER_BYTES) * BYTE), rel=1e-5)
    summed, _, _ = fft("comm.sum=exact", "comm.secure=true", "comm.collective=reduce")
    assert predict(summed, classifier, machine(dense=LOCAL))["dense"]["upload"] == pytest.approx(agreed + 2 * (0.5 + nbytes * BYTE))


def test_emulated_links_stand_in_place_of_the_measured_verbs() -> None:
    config, classifier, nbytes = fft("network.mode=virtual", "network.up_mbit=1", "network.down_mbit=8")
    parts = predict(config, classifier, machine(dense=LOCAL))["dense"]
    assert parts["upload"] == pytest.approx(8 * parts["broadcast"], rel=0.01) and parts["broadcast"] > nbytes * BYTE


def test_a_world_of_one_moves_nothing() -> None:
    config, classifier, _ = fft()
    parts = predict(config, classifier, machine(size=1, dense=LOCAL))["dense"]
    assert parts["broadcast"] == parts["upload"] == parts["control"] == 0


def test_beyond_the_largest_size_time_grows_with_the_bytes() -> None:
    config, classifier, nbytes = fft()
    small = machine(dense=LOCAL)
    small["verbs"] = [row | {"bytes": row["bytes"] // 10**4, "seconds": 3.0, "own_seconds": 2.0} for row in small["verbs"]]
    assert predict(config, classifier, small)["dense"]["broadcast"] == pytest.approx(3 * nbytes / 100, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.max_length=64", "measured with data.max_length 32, and here it is 64"),
        ("model.config.hidden_size=32", "measured with model.config "),
        ("clients.batch_size=4", "measured with clients.batch_size 16, and here it is 4"),
        ("run.threads=2", "measured with run.threads 1, and here it is 2"),
    ],
)
def test_a_machine_measured_with_another_step_foretells_nothing(change: str, words: str) -> None:
    _, classifier, _ = fft()
    with pytest.raises(ConfigError, match=f"--machine: {words}"):
        predict(fft(change)[0], classifier, machine(dense=LOCAL))
    predict(fft("method.dense.rounds=9", "method.dense.lr=1", "clients.epochs=7")[0], classifier, machine(dense=LOCAL))


@pytest.mark.parametrize("name", [*PRESETS, "custom"])
def test_a_rehearsal_is_short_whatever_the_method(name: str) -> None:
    phases = [f"method.phases={[{'kind': 'head', 'rounds': 40}, {'kind': 'bitfit'}]}"] if name == "custom" else []
    config = tiny(f"method.name={name}", *(f"method.{kind}.rounds=250" for (kind, *_) in PRESETS.values()), *phases)
    assert {phase.rounds for phase in rehearsal(config).method.resolved()} == {3}


def test_a_rehearsal_measures_every_phase_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = tiny("clients.epochs=1", "data.limit=80")
    found = rehearse(config, Alone(), torch.device("cpu"))
    assert found and list(found["phases"]) == ["sparse", "lowrank"] and sum(found["documents"]) == 80
    assert all(seconds > 0 for local in found["phases"].values() for seconds in local.values())
    assert not list(tmp_path.iterdir())
    told = predict(config, shell(config.model, class_names(config)), found | {"world": {"size": 1}, "verbs": []})
    assert {name: set(parts) for name, parts in told.items()} == {name: {*PARTS, "round"} for name in found["phases"]}


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        ("world.size", {"world": {"size": 0}}),
        ("verbs.0.seconds", {"verbs": [{"verb": "gather", "bytes": 8, "own_seconds": 1.0}]}),
        ("documents", {"documents": 6}),
        ("phases.dense.step_seconds", {"phases": {"dense": {"step_seconds": None, "server_seconds": 0.1}}}),
    ],
)
def test_a_damaged_measurement_is_named(place: str, damage: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine(dense=LOCAL)))
    assert read_machine(path) == machine(dense=LOCAL)
    path.write_text(json.dumps(machine(dense=LOCAL) | damage))
    with pytest.raises(ConfigError, match=rf"--machine: .*machine\.json is damaged \({place}: ") as error:
        read_machine(path)
    assert "\n" not in str(error.value)


def test_what_is_no_measurement_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"text": "not JSON", "other": "{}", "idle": json.dumps({"world": {"size": 2}, "verbs": []})}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match="--machine") as error:
            read_machine(tmp_path / name)
        assert "doctor" in error.value.allowed
    config, classifier, _ = fft()
    with pytest.raises(ConfigError, match="knows no phase dense"):
        predict(config, classifier, machine(sparse=LOCAL))
    with pytest.raises(ConfigError, match=r"--machine: measured with 6 clients, and clients\.count is 7"):
        predict(tiny("clients.count=7"), classifier, machine(sparse=LOCAL))
    sealed = machine(dense=LOCAL)
    sealed["verbs"] = [row for row in sealed["verbs"] if row["verb"] != "reduce"]
    with pytest.raises(ConfigError, match="--machine: knows no reduce"):
        predict(fft("comm.collective=reduce")[0], classifier, sealed)
    with pytest.raises(ConfigError, match="--machine: knows no broadcast"):
        predict(config, classifier, sealed | {"verbs": []})
    assert main(["plan", str(TINY), "--machine", str(tmp_path / "none")]) == 2
    assert "--machine" in capsys.readouterr().err
