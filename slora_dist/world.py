"""Who this process is among the ranks of a run: read from the variables that a launcher sets, once, at the start.

Which variables win: torchrun's (also inside srun or mpiexec), then Open MPI's, then MPICH's, then those of an srun step. ``srun
--mpi=pmi2`` sets PMI_RANK and ``srun --mpi=pmix`` PMIX_RANK, but the step is the launcher there, and whether the ranks talk MPI is for
``comm.backend`` to say. A plain batch script or an salloc shell is no srun step. There the program is a world of one, unless the allocation
was asked for several tasks: then somebody forgot ``srun``, and one rank playing alone on four would go unnoticed, so it is an error.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from slora_dist.errors import ConfigError

PROGRAM = "-m slora_dist train CONFIG.yaml"
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # SLURM numbers the batch, interactive and extern steps downwards from 2^32


@dataclass(frozen=True)
class World:
    """A rank's place: ``rank`` of ``size`` in all, ``local_rank`` of ``local_size`` on its machine.

    ``local_size`` is a lower bound where the launcher does not tell it. ``launcher`` is alone, torchrun, openmpi, mpich or slurm.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


@dataclass(frozen=True)
class _Names:
    """The variables in which a launcher says rank, size, local rank and local size; the first of several that is set counts."""

    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_NAMES = {
    "torchrun": _Names("RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    "openmpi": _Names(
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "mpich": _Names("PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
    "slurm": _Names("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ()),
}


def detect(environ: Mapping[str, str]) -> World:
    """Return this process's place in the world that its launcher has started.

    Raises ``ConfigError`` naming a variable that is missing or contradicts another, with the command line that should have been typed.
    """
    launcher = _launcher(environ)
    if launcher == "alone":
        _refuse_lost_rank(environ)
        return World(0, 1, 0, 1, "alone")
    world = _read(environ, launcher)
    if launcher == "torchrun" and world.size > 1:
        rendezvous(environ, world)
    return world


def launch(environ: Mapping[str, str]) -> str | None:
    """Return a name of the torchrun agent that has started this rank, None where there is none.

    The ranks that it starts anew when one has died (``--max-restarts``) find the same name, and no other launch has it.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    agent = os.getppid()
    since = Path(f"/proc/{agent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]  # numbers of processes come again
    return f"{socket.gethostname()} {agent} {since}"


def command(launcher: str, size: int) -> str:
    """Return the command line that starts ``size`` ranks with ``launcher``."""
    if launcher == "slurm":
        return f"srun --ntasks {size} python {PROGRAM}"
    if launcher in ("mpich", "openmpi"):
        return f"mpiexec -n {size} python {PROGRAM}"
    return f"torchrun --standalone --nproc-per-node {size} {PROGRAM}"


def rendezvous(environ: Mapping[str, str], world: World) -> tuple[str, int]:
    """Return host and port at which the ranks of a torch.distributed world meet: MASTER_ADDR and MASTER_PORT.

    In an srun step what is not set is made up alike on every rank: the step's first host and port 20000 + job id mod 10000.
    """
    made_up = _slurm_meeting(environ) if world.launcher == "slurm" else {}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name) and name not in made_up:
            problem = f"not set, and the {world.size} ranks of {world.launcher} need it to meet"
            raise ConfigError(name, problem, _with_master(world))
    host = environ.get("MASTER_ADDR") or made_up["MASTER_ADDR"]
    port = _integer({"MASTER_PORT": environ.get("MASTER_PORT") or made_up["MASTER_PORT"]}, "MASTER_PORT", _with_master(world))
    if not 0 < port < 65536:
        raise ConfigError("MASTER_PORT", f"{port} is no port", "1 to 65535")
    return host, port


def check_size(world: World, found: int) -> None:
    """Raise ``ConfigError`` if the transport sees ``found`` ranks where the launcher has started another number.

    A launcher and an MPI library that do not belong together do not fail: every rank silently becomes a world of one.
    """
    if found == world.size:
        return
    problem = f"{world.launcher} started {world.size} ranks, but the MPI library that mpi4py loads sees a world of {found}"
    if world.launcher == "slurm":
        step = command("slurm", world.size).removeprefix("srun")
        raise ConfigError(
            "comm.backend", problem, f"srun --mpi=pmi2{step} with MPICH, srun --mpi=pmix{step} with Open MPI, or comm.backend=gloo"
        )
    if world.launcher == "torchrun":
        raise ConfigError("comm.backend", problem, f"comm.backend=gloo, or {command('mpich', world.size)}")
    size = max(found, world.size)
    raise ConfigError("comm.backend", problem, f"{command('mpich', size)}, with the mpiexec that belongs to that library")


def hosts(nodelist: str) -> list[str]:
    """Expand SLURM's short form: ``node[1-3,07],gpu5`` is node1, node2, node3, node07 and gpu5."""
    return [host for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist) for host in _expand(item)]


def _expand(item: str) -> list[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, after = rest.partition("]")
    return [before + number + tail for number in _numbers(inside) for tail in _expand(after)]


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        yield from (str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1))


def _launcher(environ: Mapping[str, str]) -> str:
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return "torchrun"
    if "OMPI_COMM_WORLD_RANK" in environ:
        return "openmpi"
    in_step = _in_step(environ)
    if "PMI_RANK" in environ and ("MPI_LOCALRANKID" in environ or not in_step):  # mpiexec names local ranks, srun's PMI does not
        return "mpich"
    return "slurm" if in_step else "alone"


def _in_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in environ and step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def _refuse_lost_rank(environ: Mapping[str, str]) -> None:
    """Raise if the variables say that this process ought to be one of several ranks, though no launcher says which."""
    if "PMIX_RANK" in environ:
        raise ConfigError("PMIX_RANK", "set, but nothing tells the number of ranks", f"{command('openmpi', 4)}, or srun")
    tasks = environ.get("SLURM_NTASKS", "1")
    if tasks.isdecimal() and int(tasks) > 1:
        problem = f"the allocation has {tasks} tasks, but this program was not started by srun"
        raise ConfigError("SLURM_NTASKS", problem, f"{command('slurm', int(tasks))}; for a single rank {command('slurm', 1)}")


def _read(environ: Mapping[str, str], launcher: str) -> World:
    names = _NAMES[launcher]
    size = _integer(environ, _first(environ, names.size), command(launcher, 4))
    right = command(launcher, max(size, 1))
    rank = _integer(environ, names.rank, right)
    _below(names.rank, rank, _first(environ, names.size), size, right)
    local_rank = _optional(environ, names.local_rank, 0, right)
    local_size = _optional(environ, names.local_size, local_rank + 1, right)
    if launcher == "slurm":
        local_size = _slurm_local_size(environ, local_size)
    _below(names.local_rank[0], local_rank, "the local size", local_size, right)
    return World(rank, size, local_rank, local_size, launcher)


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in environ), names[0])


def _optional(environ: Mapping[str, str], names: tuple[str, ...], default: int, right: str) -> int:
    return next((_integer(environ, name, right) for name in names if name in environ), default)


def _integer(environ: Mapping[str, str], name: str, right: str) -> int:
    text = environ.get(name)
    if text is None:
        raise ConfigError(name, "not set, though the launcher's other variables are", right)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(name, f"{text!r} is no integer", right) from None


def _below(name: str, index: int, bound_name: str, bound: int, right: str) -> None:
    if not 0 <= index < bound:
        raise ConfigError(name, f"{index} with {bound_name} = {bound}", right)


def _with_master(world: World) -> str:
    if world.launcher == "torchrun":
        return command("torchrun", world.size)
    return f"MASTER_ADDR=<host of rank 0> MASTER_PORT=29500 {command(world.launcher, world.size)}"


def _slurm_meeting(environ: Mapping[str, str]) -> dict[str, str]:
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    job = environ.get("SLURM_JOB_ID", "")
    meeting = {"MASTER_ADDR": hosts(nodelist)[0]} if nodelist else {}
    return meeting | ({"MASTER_PORT": str(20000 + int(job) % 10000)} if job.isdecimal() else {})


def _slurm_local_size(environ: Mapping[str, str], default: int) -> int:
    """Return this node's entry of SLURM_STEP_TASKS_PER_NODE, which reads ``2(x3),1`` for 2, 2, 2, 1."""
    entries = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = (int(count) for count, times in entries for _ in range(int(times or 1)))
    return next(islice(tasks, int(environ.get("SLURM_NODEID", "0")), None), default)
