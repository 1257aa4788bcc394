"""Batch jobs on a real SLURM cluster, from the files that users submit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slora_dist.ending import LAST_WORDS
from tests.cluster.conftest import LONG
from tests.cluster.processes import command_line, having
from tests.cluster.runs import adapter, lines, payload, ranks, rounds
from tests.cluster.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.cluster


def finish(slurm: SlurmCluster, number: str, shared: Path) -> str:
    facts = slurm.wait(number)
    log = "".join(file.read_text() for file in shared.glob(f"{number}*.out"))
    assert facts["JobState"] == "COMPLETED", f"{facts}\n{log}"
    return log


@pytest.mark.parametrize(
    ("script", "nodes", "overrides", "transport"),
    [("torchrun", 3, (), "gloo"), ("direct", 3, (), "gloo"), ("mpi", 3, ("comm.backend=mpi",), "mpi"), ("mpirun", 2, (), "mpi")],
)
def test_a_job_ends_in_the_bits_and_the_payload_of_a_world_of_one(
    slurm: SlurmCluster, shared: Path, alone: Path, script: str, nodes: int, overrides: tuple[str, ...], transport: str
) -> None:
    number = slurm.submit(f"--nodes={nodes}", f"slurm/{script}.sbatch", "configs/tiny.yaml", *LONG, *overrides, "--out", "run", cwd=shared)
    log = finish(slurm, number, shared)
    run = shared / "run"
    assert adapter(run) == adapter(alone), log
    assert payload(run) == payload(alone) and ranks(run) == set(range(nodes))
    assert f'"transport": "{transport}"' in (run / "config.json").read_text()


def test_a_requeued_job_goes_on_and_ends_in_the_bits_of_an_undisturbed_one(slurm: SlurmCluster, shared: Path, alone: Path) -> None:
    command = [sys.executable, "-m", "slora_dist", "slurm", "configs/tiny.yaml", *LONG, "--nodes", "2", "--launcher", "srun", "--requeue"]
    number = slurm(*command, "--out", "run", cwd=shared).split()[-1]
    run = shared / "run"
    slurm.until(lambda: len(rounds(run)) >= 3, "three rounds")
    slurm("scancel", "--batch", "--signal=USR1", number)  # what SLURM itself sends before the time is up
    slurm.until(lambda: slurm.job(number).get("Restarts") == "1", "the second life")
    noted = len(rounds(run))
    assert 3 <= noted < 20, "the signal came when all was done"
    facts = slurm.wait(number)
    assert facts["JobState"] == "COMPLETED", (shared / f"tiny-{number}.out").read_text()
    assert rounds(run) == list(range(1, 21))
    assert adapter(run) == adapter(alone) and payload(run) == payload(alone)


def test_an_array_sweeps_four_configurations(slurm: SlurmCluster, shared: Path) -> None:
    methods = ["slora", "sft", "lora", "fft"]
    short = "method.sparse.rounds=1 method.lowrank.rounds=1 method.dense.rounds=1 'data.limit=64'"
    sweep = [f"configs/tiny.yaml method.name={method} {short} --out runs/{method}\n" for method in methods]
    (shared / "sweep.txt").write_text("".join(sweep))
    number = slurm.submit("--array=1-4", "slurm/array.sbatch", "sweep.txt", cwd=shared)
    slurm.until(lambda: not slurm("squeue", "-h", "--jobs", number), "the end of the array", 120)
    log = "".join(file.read_text() for file in shared.glob("*.out"))
    for method in methods:
        assert (shared / "runs" / method / "summary.json").exists(), log
    assert {line["phase"] for line in lines(shared / "runs/fft", "metrics.jsonl")} == {"dense"}


def test_a_study_is_one_array_job(slurm: SlurmCluster, shared: Path) -> None:
    short = "{data.limit: 64, method.lowrank.rounds: 1, method.dense.rounds: 1, clients.epochs: 1}"
    grid = "methods: {fft: {method.name: fft}, lora: {method.name: lora}}"
    (shared / "study.yaml").write_text(f"base: configs/tiny.yaml\nset: {short}\n{grid}\n")
    study = [sys.executable, "-m", "slora_dist", "study", "study.yaml", "--out", "cells"]
    number = slurm(*study, "--slurm", "--jobs", "2", cwd=shared).split()[-1]
    slurm.until(lambda: not slurm("squeue", "-h", "--jobs", number), "the end of the array", 120)
    log = "".join(file.read_text() for file in shared.glob("*.out"))
    assert {path.parent.parent.name for path in (shared / "cells").rglob("summary.json")} == {"fft", "lora"}, log
    slurm(*study, "--tables-only", cwd=shared, timeout=120)
    assert "| lora " in (shared / "cells/tables.md").read_text()


@pytest.mark.parametrize(
    ("script", "variable", "named", "overrides"),
    [
        ("torchrun", "RANK", r"rank +: 2 .*\n.*exitcode +: -9", ()),
        ("direct", "SLURM_PROCID", r"node3: task 2: Killed", ()),
        ("mpi", "SLURM_PROCID", r"node3: task 2: Killed", ("comm.backend=mpi",)),
    ],
)
def test_the_death_of_a_rank_ends_the_job_and_leaves_nothing_behind(
    slurm: SlurmCluster, shared: Path, script: str, variable: str, named: str, overrides: tuple[str, ...]
) -> None:
    """One line names the dead rank and what it was doing; the launcher names it, too, and the others say where they were.

    The lines are read in the run folder: srun may drop what ranks print while it ends them by force.
    """
    endless = ("method.sparse.rounds=1000", *overrides)
    number = slurm.submit("--nodes=3", f"slurm/{script}.sbatch", "configs/tiny.yaml", *endless, "--out", "run", cwd=shared)
    slurm.until(lambda: len(rounds(shared / "run")) >= 2, "two rounds", 90)
    victim, _witness = sorted(pid for pid in having({"SLURM_JOB_ID": number, variable: "2"}) if is_rank(pid))
    os.kill(victim, signal.SIGKILL)
    assert slurm.wait(number, 40)["JobState"] == "FAILED"
    log = (shared / f"{number}.out").read_text()
    assert re.search(named, log), log
    slurm.until(lambda: not list(having({"SLURM_JOB_ID": number})), "nothing left of the job", 20)
    died, others = (words(shared / "run", *ranks) for ranks in ((2,), (0, 1)))
    assert re.search(r"^died in phase sparse, round \d+, \w+", died, re.MULTILINE), died + log
    assert re.search(r"^(failed|ended by SIGTERM) in phase sparse, round \d+, \w+", others, re.MULTILINE), others + log


def words(run: Path, *ranks: int) -> str:
    """Return the last words of some ranks."""
    files = [run / LAST_WORDS.format(rank=rank) for rank in ranks]
    return "".join(file.read_text() for file in files if file.exists())


def is_rank(pid: int) -> bool:
    """Whether a process is a rank, and not the agent or the shell that started it."""
    line = command_line(pid)
    return " -m slora_dist train " in line and not re.search("distributed.run|srun", line)


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "mpi"])
def test_slurm_and_shellcheck_accept_what_is_written(slurm: SlurmCluster, shared: Path, launcher: str) -> None:
    options = ["--nodes", "2", "--ranks-per-node", "2", "--partition", "test", "--time", "10:00", "--launcher", launcher, "--requeue"]
    text = slurm(sys.executable, "-m", "slora_dist", "slurm", "configs/tiny.yaml", "data.limit=64", *options, "--dry-run", cwd=shared)
    (shared / "job.sbatch").write_text(text)
    slurm("sbatch", "--test-only", "job.sbatch", cwd=shared)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", shared / "job.sbatch"], check=True)


def test_a_job_goes_on_without_a_killed_rank(slurm: SlurmCluster, shared: Path, environ: dict[str, str]) -> None:
    """One of four clients dies in round 5 of 10: rounds 5 to 10 finish with three, to the bits of a run that was planned so."""
    settings = ["configs/tiny.yaml", "clients.count=4", "clients.per_round=4", "method.sparse.rounds=5", "method.lowrank.rounds=5"]
    ranks = ("--nodes=3", "--ntasks=5", "--ntasks-per-node=2")
    number = slurm.submit(*ranks, "slurm/healing.sbatch", *settings, "clients.min_clients=2", "--out", "run", cwd=shared)
    run = shared / "run"
    slurm.until(lambda: len(rounds(run)) >= 4, "four rounds", 90)
    victim, _witness = sorted(pid for pid in having({"SLURM_JOB_ID": number, "SLURM_PROCID": "3"}) if is_rank(pid))
    os.kill(victim, signal.SIGKILL)
    facts = slurm.wait(number, 90)
    log = (shared / f"{number}.out").read_text()
    assert facts["ExitCode"] == "3:0", f"{facts}\n{log}"
    assert "[rank 0] rank 3 is gone" in log
    records = lines(run, "metrics.jsonl")
    first = next(record["round"] for record in records if record["missing"]["clients"])
    assert [record["round"] for record in records] == list(range(1, 11))
    assert [record["clients"] for record in records] == [[0, 1, 2, 3]] * (first - 1) + [[0, 1, 3]] * (11 - first)
    (lost,) = json.loads((run / "summary.json").read_text())["lost"]
    assert (lost["rank"], lost["round"], lost["clients"]) == (3, first, [2])
    planned = [sys.executable, "-m", "slora_dist", "train", *settings, f"clients.away={{2: [{first}]}}", "--out", "planned"]
    subprocess.run(planned, check=True, env=environ, cwd=shared, timeout=120, stdout=subprocess.DEVNULL)
    assert adapter(run) == adapter(shared / "planned")


def test_a_rank_0_that_stands_still_does_not_hold_the_job(slurm: SlurmCluster, shared: Path) -> None:
    """The others find that it does not answer; srun says so to the batch script, which then ends it."""
    settings = ["configs/tiny.yaml", "method.sparse.rounds=1000", "clients.min_clients=2", "comm.client_timeout=5", "--out", "run"]
    number = slurm.submit("--nodes=3", "--ntasks=4", "--ntasks-per-node=2", "slurm/healing.sbatch", *settings, cwd=shared)
    slurm.until(lambda: len(rounds(shared / "run")) >= 2, "two rounds", 90)
    _shell, root, _witness = sorted(pid for pid in having({"SLURM_JOB_ID": number, "SLURM_PROCID": "0"}) if is_rank(pid))
    os.kill(root, signal.SIGSTOP)
    facts = slurm.wait(number, 120)
    log = (shared / f"{number}.out").read_text()
    assert facts["ExitCode"].split(":")[0] == "137", f"{facts}\n{log}"
    assert log.count("rank 0 stands still, and all others have ended: killed after 20 s; --resume goes on") == 1, log
    slurm.until(lambda: not list(having({"SLURM_JOB_ID": number})), "nothing left of the job", 20)
