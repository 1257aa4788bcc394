"""The start scripts, where the launcher writes down what it was given."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"


def started(script: str, folder: Path, version: str = "", **variables: str) -> tuple[list[str], str, str]:
    """(arguments of the launcher, the secret in its environment, what was said on stderr)."""
    for name in ("torchrun", "mpiexec"):
        say = 'printf "%s\\0" "$@" > given; echo "${SLORA_DIST_SECRET:-none}${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-}" > secret'
        (folder / name).write_text(f'#!/bin/bash\nif [ "$1" = --version ]; then echo "{version}"; exit; fi\n{say}\n')
        (folder / name).chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    ended = subprocess.run([LAUNCH / script, "a.yaml"], cwd=folder, env=environ, capture_output=True, text=True, timeout=20, check=True)
    return (folder / "given").read_text().split("\0")[:-1], (folder / "secret").read_text().strip(), ended.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh"])
def test_a_job_on_one_machine_gets_a_fresh_secret(script: str, tmp_path: Path) -> None:
    runs = [started(script, tmp_path) for _ in range(2)]
    secrets = {secret for _, secret, _ in runs}
    assert len(secrets) == 2 and all(len(bytes.fromhex(secret)) == 32 for secret in secrets)
    assert not any(secret in argument for secret in secrets for given, _, _ in runs for argument in given)
    assert all(given[-4:] == ["-m", "slora_dist", "train", "a.yaml"] and not said for given, _, said in runs)
    assert started(script, tmp_path, COMMAND="doctor")[0][-2:] == ["doctor", "a.yaml"]
    assert started(script, tmp_path, SLORA_DIST_SECRET="my own")[1] == "my own"
    assert started(script, tmp_path, SLORA_DIST_SECRET_FILE="file")[1] == "none"


# what a rank does, by its number; srun plays three of them, says how they end as SLURM's does, and ends with the highest exit code
RANK = """#!/bin/bash
case ${RANK:-$SLURM_PROCID} in 0) %s;; 1) %s;; 2) %s;; esac
"""
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=3
for rank in 0 1 2; do SLURM_PROCID=$rank "$@" & pids[rank]=$!; done
echo "${pids[*]}" > tasks
worst=0
for rank in 2 1 0; do # as srun --wait=0 does, which may see them end in any order
  code=0
  wait "${pids[rank]}" || code=$?
  if [ $code -gt 0 ]; then echo "srun: error: node[1-2]: task $rank: Exited with exit code $code" >&2; fi
  if [ $code -gt $worst ]; then worst=$code; fi
done
exit $worst
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=KILL 7.0" ] || exit 1
for task in $(cat tasks); do kill -KILL $(cat /proc/$task/task/$task/children) $task; done 2>/dev/null
true
"""
STOP = "kill -STOP $$"


def healed(script: str, folder: Path, ranks: tuple[str, str, str]) -> tuple[int, str]:
    """(exit code, what was said on stderr) of a start script whose three ranks do as they are told."""
    for name, text in {"python": RANK % ranks, "srun": SRUN, "scancel": SCANCEL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "RANKS": "3", "GRACE": "1", "SLURM_JOB_ID": "7"}
    command = ["bash", LAUNCH.parent / script, "a.yaml"]
    ended = subprocess.run(command, cwd=folder, env=environ, timeout=30, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr


healing = pytest.mark.parametrize("script", ["launch/ranks.sh", "slurm/healing.sbatch"])


@healing
def test_a_rank_that_stands_still_does_not_hold_up_the_end(script: str, tmp_path: Path) -> None:
    """The others have gone on without it, to rank 0's exit code 3; only a kill ends it."""
    code, said = healed(script, tmp_path, ("exit 3", STOP, "exit 0"))
    assert code == 3 and "rank 0 stands still" not in said


@healing
def test_a_rank_0_that_stands_still_does_not_hold_up_the_end(script: str, tmp_path: Path) -> None:
    """One of the others has left because rank 0 does not answer, another has died."""
    code, said = healed(script, tmp_path, (STOP, "exit 137", "exit 4"))
    assert code == 137 and said.count("rank 0 stands still, and all others have ended: killed after 1 s") == 1, said


@healing
def test_rank_0_is_waited_for_while_ranks_that_joined_may_be_with_it(script: str, tmp_path: Path) -> None:
    """All that the script has started are gone, and none of them because of rank 0."""
    code, said = healed(script, tmp_path, ("sleep 4; exit 3", "exit 137", "exit 1"))
    assert code == 3 and "rank 0 stands still" not in said


def test_on_several_machines_torchrun_is_told_the_secret_or_says_that_there_is_none(tmp_path: Path) -> None:
    several = {"NODES": "2", "HEAD": "host1"}
    given, secret, said = started("torchrun.sh", tmp_path, **several)
    assert secret == "none" and "whoever reaches host1:29400 can join" in said and "--nnodes" in given
    assert not started("torchrun.sh", tmp_path, **several, SLORA_DIST_SECRET_FILE="file")[2]


def test_restarts_keep_the_agents_store_out(tmp_path: Path) -> None:
    given, _, _ = started("torchrun.sh", tmp_path, RESTARTS="3", SLORA_DIST_SECRET="s")
    assert given[given.index("--max-restarts") + 1] == "3" and (tmp_path / "secret").read_text().strip() == "s1"


def test_open_mpi_is_told_to_hand_the_secret_on(tmp_path: Path) -> None:
    given, _, _ = started("mpirun.sh", tmp_path, version="mpiexec (OpenRTE) 4.1.4")
    assert given[:2] == ["-x", "SLORA_DIST_SECRET"]
    given, _, _ = started("mpirun.sh", tmp_path, version="mpiexec (Open MPI) 5.0.11", SLORA_DIST_SECRET_FILE="file")
    assert given[:2] == ["-x", "SLORA_DIST_SECRET_FILE"]
    assert "-x" not in started("mpirun.sh", tmp_path, version="HYDRA build details: Version: 5.0.2")[0]


def test_mpiexec_is_asked_to_let_the_others_live(tmp_path: Path) -> None:
    given, _, _ = started("mpirun.sh", tmp_path, version="mpiexec (Open MPI) 5.0.11", FT="ulfm")
    assert given[given.index("--with-ft") + 1] == "ulfm" and "-n" in given[given.index("--with-ft") :]
    assert "--with-ft" not in started("mpirun.sh", tmp_path, version="mpiexec (Open MPI) 5.0.11")[0]
