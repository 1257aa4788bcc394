"""The run folder survives a stop at any moment."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slora_dist.errors import ConfigError
from slora_dist.runfolder import Checkpoint, RunFolder
from tests.tiny import tiny


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "deep" / "run")
    made.create(tiny(), {"size": 1})
    return made


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint({"offset": torch.full((3,), float(number)), "optimizer.step": torch.tensor(2.0)}, {"round": number, "phase": 0})


def state(folder: RunFolder) -> int:
    found = folder.latest()
    assert found and bool((found.tensors["offset"] == found.values["round"]).all())
    return int(found.values["round"])


def test_settings_come_back_and_a_run_is_never_overwritten(folder: RunFolder) -> None:
    assert folder.config() == tiny()
    with pytest.raises(ConfigError, match=r"--out: .* holds a run already.*--resume"):
        folder.create(tiny(), {})


def test_a_checkpoint_comes_back_and_only_the_last_is_kept(folder: RunFolder) -> None:
    assert folder.latest() is None
    for number in (1, 2, 3):
        folder.save(checkpoint(number))
        assert state(folder) == number
    assert sorted(path.name for path in (folder.path / "checkpoint").iterdir()) == ["latest", "round-00003"]
    found = folder.latest()
    assert found and torch.equal(found.tensors["optimizer.step"], torch.tensor(2.0))


@pytest.mark.parametrize("step", range(12))
def test_a_stop_at_any_step_of_saving_leaves_the_last_good_state(folder: RunFolder, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies at the ``step``-th operation on files; afterwards the old state is there or the new one, and saving works again."""
    folder.save(checkpoint(1))
    left = [step]

    def dying(true):  # type: ignore[no-untyped-def]
        def operation(*args, **kwargs):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return true(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for name in ("write_text", "rename", "replace", "mkdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr("slora_dist.runfolder.save_file", dying(save_file))
        patch.setattr("slora_dist.runfolder.shutil.rmtree", dying(shutil.rmtree))
        try:
            folder.save(checkpoint(2))
        except KeyboardInterrupt:
            assert state(folder) in (1, 2)
        else:
            assert state(folder) == 2
    folder.save(checkpoint(3))
    assert state(folder) == 3
    assert sorted(path.name for path in (folder.path / "checkpoint").iterdir() if not path.name.startswith(".")) == [
        "latest",
        "round-00003",
    ]


def test_a_missing_pointer_is_a_run_without_a_finished_round(folder: RunFolder) -> None:
    folder.save(checkpoint(1))
    (folder.path / "checkpoint" / "latest").unlink()
    assert folder.latest() is None


def test_a_damaged_checkpoint_is_said(folder: RunFolder) -> None:
    folder.save(checkpoint(1))
    path = folder.path / "checkpoint" / "round-00001" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"--resume: .* cannot be read"):
        folder.latest()


def test_rewind_drops_what_will_be_played_again(folder: RunFolder) -> None:
    for number in (0, 1, 2, 3):
        folder.append("metrics", [{"round": number}])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "acc')
    assert [line["round"] for line in folder.lines("metrics")] == [0, 1, 2, 3]
    folder.rewind(2)
    assert (folder.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n{"round": 2}\n'
    folder.append("metrics", [{"round": 3}])
    assert [line["round"] for line in folder.lines("metrics")] == [0, 1, 2, 3]


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    for read in (RunFolder(tmp_path).config, RunFolder(tmp_path).summary):
        with pytest.raises(ConfigError, match="folder of a run"):
            read()


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file/run cannot be written"):
        RunFolder(tmp_path / "file" / "run").create(tiny(), {})
