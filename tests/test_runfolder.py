"""The run folder survives a stop at any moment."""

import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slora_dist.cli import main
from slora_dist.comm.alone import Alone
from slora_dist.errors import ConfigError, RunError
from slora_dist.job import Job
from slora_dist.runfolder import Checkpoint, RunFolder
from tests.tiny import SHORT, run, same, tiny


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "deep" / "run")
    made.create(tiny(), {"size": 1})
    return made


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint({"offset": torch.full((3,), float(number)), "optimizer.step": torch.tensor(2.0)}, values(number))


def values(number: int) -> dict[str, Any]:
    return {"round": number, "phase": 0, "switch": None, "score": None, "unjudged": None}


def test_who_leaves_in_the_middle_of_waiting_waits_all_the_same(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's handler runs where the main thread waits for the disk, and never comes back there."""
    go, save = threading.Event(), folder.save

    def slow(checkpoint: Checkpoint) -> None:
        go.wait()
        save(checkpoint)

    def interrupted(self: Future[None]) -> None:
        threading.Timer(0.01, go.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "save", slow)
    folder.save_behind(checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.wait()
    folder.finish()
    assert state(folder) == 1


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


def test_damage_that_leaves_files_readable_shows_all_the_same(folder: RunFolder) -> None:
    folder.save(checkpoint(3))
    for name in ("state.safetensors", "state.json"):
        path = folder.path / "checkpoint" / "round-00003" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:] if name.endswith("tensors") else whole.replace(b"3", b"4"))
        with pytest.raises(ConfigError, match=r"state\.sha256 cannot be read \(the files beside it are not those that were written"):
            folder.latest()
        path.write_bytes(whole)
    assert state(folder) == 3


@pytest.mark.parametrize("change", [{"phase": 1}, {"round": 9}, {"round": 0}])
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, int], tmp_path: Path) -> None:
    made = run(tmp_path / "run", *SHORT, stop_after=1)
    found = made.latest()
    assert found
    made.save(Checkpoint(found.tensors, found.values | change))
    with pytest.raises(ConfigError, match="--resume: the checkpoint is of round"):
        run(made.path, resume=True)


def test_a_run_that_is_resumed_knows_whom_it_has_lost(tmp_path: Path) -> None:
    loss = {"rank": 3, "round": 1, "clients": [2], "reason": "its connection closed"}
    session = Job(tiny(*SHORT), Alone(), tmp_path / "run", torch.device("cpu")).prepare(resume=False)
    session.seat.lost.append(loss)
    assert len(list(session.play(None, 1))) == 1
    run(tmp_path / "run", resume=True, stop_after=2)
    assert run(tmp_path / "run", resume=True).summary()["lost"] == [loss]


@pytest.mark.parametrize("name", ["offset", "variate", "optimizer.momentum_buffer", "optimizer.exp_avg"])
def test_tensors_of_another_run_are_refused(name: str, tmp_path: Path) -> None:
    made = run(tmp_path / "run", *SHORT, "server.momentum=0.5", stop_after=1)
    found = made.latest()
    assert found
    made.save(Checkpoint(found.tensors | {name: torch.zeros(4)}, found.values))
    with pytest.raises(RunError, match="the checkpoint"):
        run(made.path, resume=True)


@pytest.mark.parametrize("line", ["[1]", "3", "{}", '{"round": "1"}', "[" * 100_000])
def test_a_record_without_its_round_is_said(line: str, folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").write_text(f'{{"round": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be read"):
        folder.rewind(1)


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


@pytest.mark.parametrize("text", ['{"hidden_size": 3}', '{"settings": 3}', "[]", "[" * 100_000])
def test_a_config_of_something_else_is_said(text: str, tmp_path: Path) -> None:
    """A folder of a model has one, too."""
    (tmp_path / "config.json").write_text(text)
    for command in (["train", "--resume"], ["audit"], ["report"], ["export"]):
        given = [*command, str(tmp_path), *([str(tmp_path / "out")] if command == ["export"] else [])]
        assert main(given) == 2
        assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file/run cannot be written"):
        RunFolder(tmp_path / "file" / "run").create(tiny(), {})


@contextmanager
def files_up_to(nbytes: int) -> Iterator[None]:
    """No file grows beyond ``nbytes``: the kernel then says EFBIG, as a full disk says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_the_last_good_state(folder: RunFolder) -> None:
    folder.save(checkpoint(1))
    folder.append("metrics", [{"round": 1}])
    large = Checkpoint({"offset": torch.full((5000,), 2.0)}, values(2))
    with files_up_to(4000):
        with pytest.raises(RunError, match=r"\.round-00002\.part cannot be written \(.*File too large"):
            folder.save(large)
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written \(File too large\); --resume goes on"):
            folder.append("metrics", [{"round": 2, "text": "x" * 5000}])
        with pytest.raises(RunError, match=r"base-1\.safetensors cannot be written"):
            folder.save_base({"a": torch.zeros(5000)}, 1)
        with pytest.raises(RunError, match=r"summary\.json cannot be written"):
            folder.write_summary({"x": "x" * 5000})
        folder.save_behind(large)
        with pytest.raises(RunError, match=r"\.round-00002\.part cannot be written"):
            folder.wait()
        assert state(folder) == 1
    assert folder.lines("metrics") == [{"round": 1}]
    folder.rewind(1)
    folder.save(large)
    folder.append("metrics", [{"round": 2}])
    assert state(folder) == 2 and folder.lines("metrics") == [{"round": 1}, {"round": 2}]
    assert sorted(path.name for path in (folder.path / "checkpoint").iterdir()) == ["latest", "round-00002"]


def test_a_run_on_a_full_disk_stops_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *SHORT)
    size = (whole.path / "ledger.jsonl").stat().st_size
    with files_up_to(size * 3 // 4), pytest.raises(RunError, match="cannot be written"):
        run(tmp_path / "run", *SHORT)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert same(run(tmp_path / "run", resume=True), whole)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "latest": (lambda base: (base / "latest").write_text("round-00009"), "round-00009/state.json cannot be read"),
    "latest leads elsewhere": (lambda base: (base / "latest").write_text("../../x"), "latest cannot be read"),
    "latest empty": (lambda base: (base / "latest").write_text(""), "latest cannot be read"),
    "latest no text": (lambda base: (base / "latest").write_bytes(b"\xff\xfe"), "latest cannot be read"),
    "no tensors": (lambda base: (base / "round-00001/state.safetensors").unlink(), "state.safetensors cannot be read"),
    "half the tensors": (lambda base: os.truncate(base / "round-00001/state.safetensors", 90), "state.safetensors cannot be read"),
    "half the values": (lambda base: os.truncate(base / "round-00001/state.json", 9), "state.json cannot be read"),
    "other values": (lambda base: (base / "round-00001/state.json").write_text("[1]"), "state.json cannot be read"),
    "other losses": (lambda base: rewrite(base / "round-00001/state.json", lost=[{"rank": 1}]), "state.json cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_cannot_be_read_is_named(name: str, folder: RunFolder) -> None:
    folder.save(checkpoint(1))
    damage, said = DAMAGE[name]
    damage(folder.path / "checkpoint")
    with pytest.raises(ConfigError, match=said) as error:
        folder.latest()
    assert error.value.setting == "--resume" and "\n" not in str(error.value)


def test_a_damaged_record_is_named(folder: RunFolder) -> None:
    (folder.path / "ledger.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 2}\n')
    with pytest.raises(ConfigError, match=r"ledger\.jsonl: cannot be read"):
        folder.rewind(2)


def test_leftovers_of_a_half_written_checkpoint_go_with_the_next_one(folder: RunFolder) -> None:
    base = folder.path / "checkpoint"
    (base / ".round-00007.part").mkdir(parents=True)
    (base / ".round-00007.part" / "state.safetensors").write_bytes(b"half")
    assert folder.latest() is None
    folder.save(checkpoint(1))
    assert sorted(path.name for path in base.iterdir()) == ["latest", "round-00001"] and state(folder) == 1


def test_a_checkpoint_that_was_read_holds_no_file(folder: RunFolder) -> None:
    """NFS keeps a deleted file under another name as long as a process maps it, and its folder with it."""
    folder.save(checkpoint(1))
    found = folder.latest()
    assert found and str(folder.path) not in Path("/proc/self/maps").read_text()


def test_an_old_checkpoint_that_cannot_be_deleted_yet_goes_with_the_next_one(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.save(checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "a file that NFS keeps")))
        folder.save(checkpoint(2))
    assert state(folder) == 2 and (folder.path / "checkpoint" / "round-00001").exists()
    folder.save(checkpoint(3))
    assert sorted(path.name for path in (folder.path / "checkpoint").iterdir()) == ["latest", "round-00003"]
