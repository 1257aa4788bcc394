"""Transports: how bytes and sums get from rank to rank. ``connect`` picks one, ``base.Communicator`` says what it can do."""

from collections.abc import Mapping

import torch

from slora_dist.comm.base import Transport
from slora_dist.comm.lifeline import Healing
from slora_dist.errors import ConfigError
from slora_dist.log import say
from slora_dist.world import World, rendezvous


def connect(
    backend: str, world: World, environ: Mapping[str, str], timeout: float, device: torch.device, healing: Healing | None = None
) -> Transport:
    """Return this rank's communicator for ``comm.backend``; ``timeout`` is seconds of one operation.

    With ``healing`` ranks that no agent watches can form a new group when one dies: on gloo, and on MPI where it can (``regroup``).

    Raises ``ConfigError`` where backend, launcher and devices do not fit together, ``RunError`` when ranks do not come together.
    """
    chosen = choose(backend, world, device)
    if chosen == "alone":
        from slora_dist.comm.alone import Alone

        return Alone()
    if chosen == "mpi":
        from slora_dist.comm.mpi_comm import MpiComm  # mpi4py is an extra, and importing it starts MPI

        if healing and healing.joins:
            raise ConfigError("--join", "MPI takes no new process into a run", "gloo, or --resume when the run has ended")
        ranks = MpiComm(world, timeout)
        if healing:
            ranks.watch(world, healing, environ)
        return ranks
    from slora_dist.comm.torch_comm import TorchComm, open_lifeline, open_store

    watcher = watched(environ)
    heals = healing is not None and chosen == "gloo" and not watcher
    if healing and not heals and world.rank == 0:
        who = f"{watcher} ends all ranks when one dies" if watcher else f"{chosen} cannot form a new group"
        say(0, f"clients.min_clients has no effect, a rank's death will end this run: {who}; --resume goes on")
    host, port = rendezvous(environ, world)
    store = open_store(host, port, world, environ)
    lifeline = open_lifeline(host, store, world, healing) if healing and heals else None
    return TorchComm(chosen, world.rank, world.size, store, timeout, device, lifeline=lifeline)


def watched(environ: Mapping[str, str]) -> str:
    """Return who watches this rank and ends all others when one dies, as far as the rank can know; empty: nobody."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun's agent"
    return "srun (SLURM_KILL_BAD_EXIT)" if environ.get("SLURM_KILL_BAD_EXIT") == "1" else ""


def choose(backend: str, world: World, device: torch.device) -> str:
    """Return alone, gloo, nccl or mpi for the setting ``comm.backend``.

    ``mpi`` is taken at its word even in a world of one, since that is how ranks look whose launcher nobody knows.
    """
    if world.size == 1 and backend != "mpi":
        return "alone"
    shared_gpu = device.type == "cuda" and world.local_size > torch.cuda.device_count()
    # where each rank sees one GPU they may all be different ones: nccl says so if they are not
    if backend == "nccl" and (device.type != "cuda" or (shared_gpu and torch.cuda.device_count() > 1)):
        problem = "nccl cannot have two ranks on one GPU" if shared_gpu else f"nccl needs GPUs, and this rank trains on {device.type}"
        raise ConfigError("comm.backend", problem, "gloo, or a GPU for every rank with run.device=cuda")
    if backend != "auto":
        return backend
    if world.launcher in ("openmpi", "mpich"):
        return "mpi"
    return "nccl" if device.type == "cuda" and not shared_gpu else "gloo"
