import os
import shutil
from pathlib import Path

import pytest
import torch

from slora_dist.clientstate import ClientStates
from slora_dist.errors import RunError
from tests.test_runfolder import files_up_to
from tests.tiny import SHORT, run, same


def state(value: float) -> dict[str, torch.Tensor]:
    return {"residual": torch.full((3,), value)}


def test_a_client_finds_the_state_of_its_last_round(tmp_path: Path) -> None:
    states = ClientStates(tmp_path)
    assert states.load(4, 1) == {}
    states.save(4, 2, state(2.0))
    states.save(5, 3, state(3.0))
    assert states.load(4, 9)["residual"].tolist() == [2.0] * 3 and states.load(5, 9)["residual"].tolist() == [3.0] * 3
    assert states.load(4, 2) == {}, "round 2 is played again: the client comes into it as it came the first time"


def test_rounds_can_be_played_again_and_old_states_go(tmp_path: Path) -> None:
    states = ClientStates(tmp_path)
    for number in (1, 2, 4, 6, 9):
        states.save(0, number, state(number))
    assert sorted(path.name for path in (tmp_path / "clients/client-00000").iterdir()) == [
        "round-00004.safetensors", "round-00006.safetensors", "round-00009.safetensors",
    ]  # fmt: skip
    assert states.load(0, 9)["residual"][0] == 6.0
    assert states.load(0, 6)["residual"][0] == 4.0, "while round 9 is played, the checkpoint of 6 may not be there yet"
    states.save(0, 7, state(7.5))
    assert states.load(0, 99)["residual"][0] == 7.5, "what was kept of later rounds is of a past that did not happen"


def test_states_of_rounds_that_did_not_count_go_and_the_one_in_hand_comes_back(tmp_path: Path) -> None:
    states = ClientStates(tmp_path)
    for client in (0, 1):
        for number in (2, 4, 5):
            states.save(client, number, state(number))
        states.rewind(client, counted=2, number=5)
        assert states.load(client, 9)["residual"][0] == 2.0, "4 was played without it, 5 broke"
    states.take_back(0, 5)
    states.save(1, 6, state(6.0))
    assert states.load(0, 9)["residual"][0] == 5.0 and states.load(1, 9)["residual"][0] == 6.0


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    states = ClientStates(tmp_path)
    states.save(3, 1, state(1.0))
    (path,) = (tmp_path / "clients/client-00003").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunError, match=r"state of client 3 .*round-00001"):
        states.load(3, 2)


def test_a_state_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    states = ClientStates(tmp_path)
    states.save(3, 1, state(1.0))
    with files_up_to(4000), pytest.raises(RunError, match=r"round-00002\.safetensors cannot be written .*; --resume goes on"):
        states.save(3, 2, {"residual": torch.zeros(5000)})
    assert states.load(3, 3)["residual"].tolist() == [1.0] * 3
    (tmp_path / "clients").rename(tmp_path / "away")
    (tmp_path / "clients").write_text("no folder")
    with pytest.raises(RunError, match=r"round-00002\.safetensors cannot be written \(Not a directory\)"):
        states.save(3, 2, state(2.0))


def test_a_state_is_on_the_disk_before_the_round_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync = list[str](), os.fsync

    def note(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    ClientStates(tmp_path).save(3, 1, state(1.0))
    assert done == ["round-00001.part", "client-00003", "clients"]


def test_a_run_that_goes_on_takes_nothing_of_rounds_that_did_not_count(tmp_path: Path) -> None:
    """A round was played without a client whose message got lost: its state of that round is there when it comes back."""
    kept = (*SHORT, "comm.wire.topk=0.2", "comm.wire.indices=gap", "method.sparse.rounds=5")
    straight, stopped = run(tmp_path / "straight", *kept), run(tmp_path / "stopped", *kept, stop_after=2)
    took_part = {client: record["round"] for record in stopped.lines("metrics") for client in record["clients"]}
    late = next(client for client, last in took_part.items() if last == 1)
    states = tmp_path / "stopped" / "clients" / f"client-{late:05d}"
    shutil.copy(next((tmp_path / "stopped" / "clients").glob("*/round-00002.safetensors")), states)
    assert same(run(tmp_path / "stopped", *kept, resume=True), straight)


def test_a_state_that_is_not_on_this_machine_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = (*SHORT, "comm.wire.topk=0.2", "comm.wire.indices=gap", "method.sparse.rounds=5")
    stopped = run(tmp_path / "run", *kept, stop_after=2)
    took_part = {client: record["round"] for record in stopped.lines("metrics") for client in record["clients"]}
    gone, last = next(iter(took_part.items()))
    shutil.rmtree(stopped.path / "clients" / f"client-{gone:05d}")
    run(tmp_path / "run", resume=True)
    said = [line for line in capfd.readouterr().err.splitlines() if "has no state of client " in line]
    assert len(said) == 1 and f"has no state of client {gone} here, which was drawn in round {last}: " in said[0]


def test_a_run_that_begins_takes_nothing_from_one_before_it(tmp_path: Path) -> None:
    kept = (*SHORT, "comm.wire.topk=0.2", "comm.wire.indices=gap")
    clean, before = run(tmp_path / "clean", *kept), run(tmp_path / "before", *kept, "run.seed=1")  # which draws others first
    shutil.copytree(before.path / "clients", tmp_path / "again" / "clients")
    assert same(run(tmp_path / "again", *kept), clean)
