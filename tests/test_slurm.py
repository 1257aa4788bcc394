"""The batch file as text, and as a shell understands it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from slora_dist.cli import main
from slora_dist.errors import ConfigError
from slora_dist.slurm import SECRET, START, TRAIN, TRAIN_AND_REQUEUE, Launcher, Options, sbatch

SCRIPTS = Path(__file__).parents[1] / "slurm"
CHOSEN = TRAIN.replace("train", '"${COMMAND:-train}"')  # by hand the doctor is started the same way


def test_the_whole_file_for_srun() -> None:
    options = Options(nodes=3, ranks_per_node=2, out="runs/a", partition="gpu", account="me", time="4:00:00", launcher="srun")
    assert sbatch("configs/tiny.yaml", ["data.limit=64"], options) == (
        "#!/bin/bash\n"
        "#SBATCH --job-name=tiny\n"
        "#SBATCH --output=tiny-%j.out\n"
        "#SBATCH --nodes=3\n"
        "#SBATCH --ntasks-per-node=2\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --account=me\n"
        "#SBATCH --time=4:00:00\n"
        "set -euo pipefail\n"
        "python=python\n"
        f"{SECRET}"
        "set -- configs/tiny.yaml data.limit=64 --out runs/a\n"
        "export SLURM_KILL_BAD_EXIT=1\n"
        'start=(srun "$python")\n'
        '"${start[@]}" -m slora_dist train "$@"\n'
    )


def run(script: str, folder: Path, **more: str) -> list[str]:
    """Run a batch file where srun writes down what it was given and the secret of its environment, and return the first."""
    (folder / "srun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > given\necho "${SLORA_DIST_SECRET:-none}" > secret\n')
    (folder / "scontrol").write_text("#!/bin/bash\necho node1\n")
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"} | more
    subprocess.run(["bash", "-c", script], check=True, cwd=folder, env=environ, timeout=20)
    return (folder / "given").read_text().split("\0")[:-1]


@pytest.mark.parametrize("launcher", START)
@pytest.mark.parametrize("requeue", [False, True])
def test_every_argument_arrives_as_it_was_given(tmp_path: Path, launcher: Launcher, requeue: bool) -> None:
    odd = ["data.text=it's $HOME", "model.config={a: 1, b: [2]}", "data.path=`x`\n"]
    text = sbatch("my configs/a.yaml", odd, Options(nodes=2, out="the run", launcher=launcher, requeue=requeue, python="/a b/python"))
    given = run(text, tmp_path)
    mpi = ["comm.backend=mpi"] * (launcher == "mpi")
    assert given[given.index("slora_dist") - 1 :] == ["-m", "slora_dist", "train", "my configs/a.yaml", *odd, *mpi, "--out", "the run"]
    assert "/a b/python" in given
    assert ("#SBATCH --requeue\n" in text) == requeue


def test_every_job_has_a_secret_of_its_own_that_no_argument_tells(tmp_path: Path) -> None:
    text = sbatch("a.yaml", [], Options(nodes=2, out="run"))
    found = set()
    for _ in range(2):
        given = run(text, tmp_path)
        found.add((tmp_path / "secret").read_text().strip())
        assert not any(secret in argument for secret in found for argument in given)
    assert len(found) == 2 and all(len(secret) == 64 and int(secret, 16) for secret in found)
    run(text, tmp_path, SLORA_DIST_SECRET="given")
    assert (tmp_path / "secret").read_text() == "given\n"
    run(text, tmp_path, SLORA_DIST_SECRET_FILE="file")
    assert (tmp_path / "secret").read_text() == "none\n"


@pytest.mark.parametrize("script", ["torchrun", "direct", "mpi"])
def test_a_script_starts_the_doctor_as_it_starts_a_run(script: str, tmp_path: Path) -> None:
    given = run((SCRIPTS / f"{script}.sbatch").read_text(), tmp_path, PYTHON="python", COMMAND="doctor")
    assert given[-2:] == ["slora_dist", "doctor"]


def test_a_later_life_resumes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").touch()
    given = run(sbatch("a.yaml", [], Options(nodes=2, out="run", requeue=True)), tmp_path)
    assert given[-4:] == ["train", "a.yaml", "--resume", "run"]


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (Options(nodes=0, out="run"), "--nodes"),
        (Options(nodes=1, ranks_per_node=0, out="run"), "--ranks-per-node"),
        (Options(nodes=1, out="run", partition="a b"), "--partition"),
        (Options(nodes=1, out="run", account="a\n#SBATCH --x"), "--account"),
        (Options(nodes=1, out="run", time=""), "--time"),
    ],
)
def test_what_slurm_would_misread_is_refused(options: Options, setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sbatch("a.yaml", [], options)
    assert caught.value.setting == setting


def test_a_run_that_is_to_heal_gets_no_batch_file_that_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["slurm", str(SCRIPTS.parent / "configs/tiny.yaml"), "--nodes", "2", "--launcher", "srun", "--dry-run"]
    assert main(asked) == 0 and main([*asked, "clients.min_clients=2"]) == 2
    assert "clients.min_clients: all ranks of this batch file end with the first that dies. Allowed: unset, or slurm/healing.sbatch" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        (["--nodes", "6"], "clients.per_round"),
        (["network.mode=sleep"], "network.mode"),
        (["comm.backend=mpi"], "comm.backend"),
        (["run.device=cuda"], "run.device"),
        (["--gpus-per-node", "0"], "--gpus-per-node"),
    ],
)
def test_what_its_ranks_cannot_play_is_refused_before_it_waits(
    changed: list[str], setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["slurm", str(SCRIPTS.parent / "configs/tiny.yaml"), "--nodes", "2", "--launcher", "torchrun", "--dry-run"]
    assert main(asked) == 0 and main([*asked, *changed]) == 2
    assert f"error: {setting}: " in capsys.readouterr().err


@pytest.mark.parametrize(("launcher", "exported"), [("torchrun", 0), ("srun", 1), ("mpi", 1)])
def test_a_rank_gets_the_cores_of_its_threads_and_a_node_its_gpus(launcher: str, exported: int, capsys: pytest.CaptureFixture[str]) -> None:
    """torchrun's ranks are no tasks of srun: its agent has all cores of the node."""
    asked = ["slurm", str(SCRIPTS.parent / "configs/tiny.yaml"), "run.threads=4", "run.device=cuda", "--nodes", "2", "--gpus-per-node", "2"]
    assert main([*asked, "--launcher", launcher, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=4\n" in text and "#SBATCH --gpus-per-node=2\n" in text
    assert text.count("\nexport SRUN_CPUS_PER_TASK=4\n") == exported


@pytest.mark.parametrize(
    ("script", "ending"),
    [
        ("torchrun", START["torchrun"] + CHOSEN),
        ("direct", START["srun"] + CHOSEN),
        ("mpi", START["mpi"] + CHOSEN),
        ("mpirun", CHOSEN),
        ("requeue", START["torchrun"] + TRAIN_AND_REQUEUE),
    ],
)
def test_the_scripts_end_in_the_same_lines(script: str, ending: str) -> None:
    text = (SCRIPTS / f"{script}.sbatch").read_text()
    assert text.endswith(ending) and text.count(SECRET) == 1


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    files = [*SCRIPTS.glob("*.sbatch"), *(SCRIPTS.parent / "launch").glob("*.sh")]
    assert len(files) == 10
    subprocess.run(["shellcheck", *files], check=True)
