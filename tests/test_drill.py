"""Some of the drills, with real processes; ``make drill`` plays a hundred."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drill import hosts, mpi, run
from tests.tiny import ROOT


@pytest.mark.launcher
def test_a_run_survives_the_death_of_a_rank_and_takes_in_another() -> None:
    """With encryption: the newcomer is handed the session's key. Before it others are refused, by their settings and by their weights."""
    drilled("1", "--only", "replace, sealed", "--first", "2")


@pytest.mark.launcher
def test_a_client_that_comes_back_owes_nothing_of_a_round_that_was_played_without_it() -> None:
    drilled("1", "--only", "replace, owing", "--first", "2")


@pytest.mark.launcher
def test_masks_of_a_client_that_dies_after_the_keys_were_exchanged_leave_no_trace() -> None:
    """Under secure aggregation, over gather (seed 0) and reduce (seed 1)."""
    drilled("2", "--only", "kill, masked")


@pytest.mark.launcher
def test_a_mask_that_is_chosen_without_a_client_is_trained_with_from_the_start() -> None:
    drilled("1", "--only", "kill, chooser")


@pytest.mark.launcher
def test_what_clients_lack_after_a_death_is_what_they_would_lack_had_it_been_planned() -> None:
    """In bytes, too: the accounts know who was there in which round."""
    drilled("1", "--only", "kill, sampled")


@pytest.mark.launcher
def test_a_base_that_takes_something_over_is_the_same_for_those_who_are_left_and_so_is_its_account() -> None:
    """Residuals kept in the base, rules fedex and stack: each loses a rank in its low-rank phase, and passes its audit."""
    drilled("3", "--only", "kill, keep", "kill, fedex", "kill, stack", "--first", "15")


@pytest.mark.launcher
def test_a_job_of_mpi_is_requeued_and_goes_on_in_another_world() -> None:
    drilled("1", "--only", "MPI requeue")


def test_faults_that_cannot_be_played_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mpi, "ULFM", replace(mpi.ULFM, bin=tmp_path))
    monkeypatch.setattr(hosts, "PROGRAMS", ("no-such-program",))
    chosen = run.chosen(["kill", "ULFM kill", "hosts slow link"])
    assert chosen == ["kill"]
    ulfm, links = capsys.readouterr().out.splitlines()
    assert ulfm.startswith("left out: ULFM kill: no Open MPI 5")
    assert links.startswith("left out: hosts slow link: needs ") and links.endswith("no-such-program")


def drilled(*arguments: str) -> None:
    command = [sys.executable, "-m", "drill.run", *arguments]
    played = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert played.returncode == 0 and f"{arguments[0]} drills, 0 failed" in played.stdout, played.stdout + played.stderr


@pytest.mark.launcher
def test_ranks_that_stand_still_end_with_rank_0_or_wake_with_all_others() -> None:
    drilled("2", "--only", "suspend", "stop rank 0")


@pytest.mark.launcher
def test_a_long_run_stays_flat() -> None:
    played = subprocess.run([sys.executable, "-m", "drill.soak", "200"], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert played.returncode == 0 and played.stdout.count("rank ") == 4, played.stdout + played.stderr
