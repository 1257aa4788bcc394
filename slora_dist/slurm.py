"""The batch file that runs a federation under SLURM, as text; ``slurm/*.sbatch`` end in the same lines.

Every launcher ends in the same command, ``train`` with its arguments. Ranks per node are SLURM's ``--ntasks-per-node`` throughout.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from slora_dist.config import Config
from slora_dist.errors import ConfigError

Launcher = Literal["torchrun", "srun", "mpi"]

# A fresh secret for every life of the job. It is made in the batch script, so that SLURM keeps it nowhere: only the environment of the
# ranks, which their user alone may read, has it.
SECRET = """\
if [ -z "${SLORA_DIST_SECRET_FILE:-}" ]; then  # ranks get the job's secret with their environment
  export SLORA_DIST_SECRET
  : "${SLORA_DIST_SECRET:=$(od -An -v -tx1 -N32 /dev/urandom | tr -d ' \\n')}"
fi
"""

# How each launcher starts the ranks. torchrun: one agent per node; the restart count keeps a requeued job from meeting its former life.
# srun: one task per rank; without --kill-on-bad-exit the others would wait for a dead one until their time-out. As a variable they see it.
START = {
    "torchrun": """\
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
start=(srun --nodes "$SLURM_NNODES" --ntasks "$SLURM_NNODES" --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=1
  "$python" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_NTASKS_PER_NODE:-1}"
  --rdzv-backend c10d --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}")
""",
    "srun": """\
export SLURM_KILL_BAD_EXIT=1
start=(srun "$python")
""",
    "mpi": """\
# MPICH over UCX publishes 4 KB of address, which pmi2 garbles where a line grows beyond 1024 bytes; over OFI it has 16 bytes.
export MPICH_CH4_NETMOD=${MPICH_CH4_NETMOD:-ofi}
start=(srun --mpi "${SLURM_MPI_TYPE:-pmi2}" --kill-on-bad-exit=1 "$python")
""",
}

TRAIN = """\
"${start[@]}" -m slora_dist train "$@"
"""

# The batch shell acts on a signal only while it waits. Whoever requeues a job ends its ranks; the next life goes on from the checkpoint.
TRAIN_AND_REQUEUE = """\
trap 'scontrol requeue "$SLURM_JOB_ID"; wait' USR1
if [ -e "$run/config.json" ]; then set -- "$@" --resume "$run"; else set -- "$@" --out "$run"; fi
"${start[@]}" -m slora_dist train "$@" &
wait $!
"""


@dataclass(frozen=True)
class Options:
    """What the batch file asks SLURM for. ``out`` is the run folder, ``python`` the interpreter that has slora_dist.

    ``threads`` are the cores of a task.
    """

    nodes: int
    out: str
    ranks_per_node: int = 1
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    launcher: Launcher = "torchrun"
    requeue: bool = False
    python: str = "python"
    gpus_per_node: int | None = None
    threads: int = 1


def sbatch(config_path: str, overrides: Sequence[str], options: Options) -> str:
    """Return the batch file that trains ``config_path`` with ``overrides``.

    Raises ``ConfigError`` for counts below 1 and for names that would not survive in an #SBATCH line.
    """
    arguments = [config_path, *overrides] + (["comm.backend=mpi"] if options.launcher == "mpi" else [])
    given = " ".join(shlex.quote(argument) for argument in arguments)
    out = shlex.quote(options.out)
    ending = f"run={out}\n{TRAIN_AND_REQUEUE}" if options.requeue else TRAIN
    return "".join(
        [
            "#!/bin/bash\n",
            *(f"#SBATCH {line}\n" for line in _requests(config_path, options)),
            f"set -euo pipefail\npython={shlex.quote(options.python)}\n{SECRET}",
            f"set -- {given}\n" if options.requeue else f"set -- {given} --out {out}\n",
            _cores(options),
            START[options.launcher],
            ending,
        ]
    )


def array(study: str, cells: int, ranks: int, at_a_time: int, options: Options) -> str:
    """Return the batch file of an array job whose task I runs cell I of a study; each run stays on one node, ``ranks`` processes of it.

    Raises ``ConfigError`` as ``sbatch`` does.
    """
    given = shlex.join(["-m", "slora_dist", "study", study, "--out", options.out])
    requests = [
        *_requests(study, replace(options, threads=ranks * options.threads)),
        f"--array=0-{cells - 1}%{_count('--jobs', at_a_time)}",
    ]
    lines = "".join(f"#SBATCH {line}\n" for line in requests)
    start = f'srun --cpu-bind none --kill-on-bad-exit=1 "$python" {given} --cell "$SLURM_ARRAY_TASK_ID"\n'
    return f"#!/bin/bash\n{lines}set -euo pipefail\npython={shlex.quote(options.python)}\n{start}"


def submit(text: str) -> str:
    """Hand a batch file to SLURM and return its answer. Raises ``ConfigError`` with SLURM's own words when it refuses."""
    try:
        answer = subprocess.run(["sbatch"], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError("sbatch", "not found", "a machine that submits to SLURM, or --dry-run") from None
    if answer.returncode:
        raise ConfigError("sbatch", f"refused ({' '.join(answer.stderr.split())})", "what the cluster offers; see sinfo")
    return answer.stdout


def _requests(config_path: str, options: Options) -> list[str]:
    name = re.sub(r"[^\w.-]", "_", Path(config_path).stem)
    lines = [
        f"--job-name={name}",
        f"--output={name}-%j.out",
        f"--nodes={_count('--nodes', options.nodes)}",
        f"--ntasks-per-node={_count('--ranks-per-node', options.ranks_per_node)}",
    ]
    if options.threads > 1:
        lines.append(f"--cpus-per-task={options.threads}")
    if options.gpus_per_node is not None:
        lines.append(f"--gpus-per-node={_count('--gpus-per-node', options.gpus_per_node)}")
    for option, value in (("--partition", options.partition), ("--account", options.account), ("--time", options.time)):
        if value is not None:
            lines.append(f"{option}={_word(option, value)}")
    if options.requeue:  # append: the next life writes on; USR1 comes two minutes before the time is up, to the batch shell alone
        lines += ["--requeue", "--open-mode=append", "--signal=B:USR1@120"]
    return lines


def _cores(options: Options) -> str:
    """Return the line by which srun's tasks get the job's cores of a task: since SLURM 22.05 a step asks for them anew."""
    return f"export SRUN_CPUS_PER_TASK={options.threads}\n" if options.threads > 1 and options.launcher != "torchrun" else ""


def check_gpus(config: Config, gpus_per_node: int | None) -> None:
    """Raise ``ConfigError`` when a run would wait for its turn to find no GPU."""
    if config.run.device == "cuda" and gpus_per_node is None:
        raise ConfigError("run.device", "cuda, but the batch file asks for no GPU", "auto, cpu; or --gpus-per-node N")


def _count(option: str, number: int) -> int:
    if number < 1:
        raise ConfigError(option, f"{number} is too few", "1 or more")
    return number


def _word(option: str, text: str) -> str:
    if not re.fullmatch(r"[\w.,:@+/-]+", text):
        raise ConfigError(option, f"{text!r} cannot stand in an #SBATCH line", "letters, digits and . , : @ + / - _")
    return text
