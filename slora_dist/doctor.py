"""``slora-dist doctor``: what this machine and this launcher offer, measured, and what to mend.

Run it under the launcher that the job will have: every rank tells where it is, and all of them time every verb of the transport.
"""

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from slora_dist.agreement import gather_bytes
from slora_dist.calibrate import rehearse
from slora_dist.comm import ulfm
from slora_dist.comm.base import Communicator
from slora_dist.comm.metered import Metered
from slora_dist.comm.sealed import Sealed
from slora_dist.config import Config
from slora_dist.ledger import Label, Ledger
from slora_dist.world import World

LIBRARIES = ("slora_dist", "torch", "transformers", "peft", "datasets", "flwr-datasets", "mpi4py", "numpy", "scipy")
SIZES = (64, 64 << 10, 1 << 20, 16 << 20)
REPEATS = 5
PATIENCE = 6.0  # seconds of one call: enough for 16 MiB on all but the slowest links
Row = dict[str, Any]


def examine(
    comm: Communicator, world: World, environ: Mapping[str, str], device: torch.device, config: Config | None = None
) -> dict[str, Any] | None:
    """Return all findings on rank 0, None elsewhere; every rank must call it.

    With a ``config`` its local work is measured too, and with ``comm.encrypt`` the verbs of a sealed ``comm``, which has no sums.
    """
    about = {"rank": comm.rank, "host": socket.gethostname(), "address": _own_address(environ), "device": str(device), "cores": _cores()}
    label = Label("doctor", 0, "control", {"about": 0})
    ranks = [json.loads(text) for text in gather_bytes(Metered(comm, Ledger(comm.rank)), json.dumps(about).encode(), label).values()]
    rehearsed = rehearse(config, comm, device) if config else None
    verbs = [row for name, call in _verbs(comm).items() for row in _measure(comm, name, call)]
    if comm.rank:
        return None
    found = {
        "versions": _versions(),
        "world": {"size": comm.size, "launcher": world.launcher, "transport": comm.name},
        "backends": _backends(comm),
        "interfaces": _interfaces(),
        "slurm": _first_line(["sinfo", "--version"]),
        "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "ranks": ranks,
        "verbs": verbs,
    } | (rehearsed or {})
    return found | {"advice": advise(found, environ, config.run.threads if config else 1)}


def advise(found: Mapping[str, Any], environ: Mapping[str, str], threads: int = 1) -> list[str]:
    """Return what to mend, one sentence each; an empty list when nothing is wrong. Ranks have as many ``threads``."""
    ranks, advice = found["ranks"], []
    by_host: dict[str, list[Row]] = {}
    for row in ranks:
        by_host.setdefault(row["host"], []).append(row)
    if len(by_host) > 1 and found["world"]["transport"] == "gloo":
        lost = next((row for row in ranks if row["address"].startswith("127.")), None)
        if lost:
            advice.append(f"{lost['host']} resolves its own name to {lost['address']}: set GLOO_SOCKET_IFNAME to the cluster's interface")
    for host, rows in by_host.items():
        if len(rows) - 1 > rows[0]["cores"] and rows[0]["device"] == "cpu":
            advice.append(f"{len(rows)} ranks train on {rows[0]['cores']} cores of {host}: expect them to wait for each other")
        spare = rows[0]["cores"] // len(rows)
        if spare > threads and rows[0]["device"] == "cpu":
            advice.append(f"{rows[0]['cores']} cores of {host} for {len(rows)} rank(s): run.threads={spare} would use them all")
        shared = {row["device"] for row in rows if row["device"] != "cpu"}
        if shared and len(shared) < len(rows):
            advice.append(f"{len(rows)} ranks of {host} share {len(shared)} GPU(s)")
    if found["world"]["size"] == 1:
        advice.append("a world of one: run `torchrun --standalone --nproc-per-node 4 -m slora_dist doctor` to measure a transport")
    if not found["versions"]["mpi4py"]:
        advice.append("mpi4py is not installed: pip install 'slora-dist[mpi]' for mpirun")
    if environ.get("OMP_NUM_THREADS", "1") != "1":
        advice.append("OMP_NUM_THREADS is set, but run.threads decides: it is part of what fixes the bits")
    return advice


def _verbs(comm: Communicator) -> dict[str, Callable[[torch.Tensor], None]]:
    def gather(wire_B: torch.Tensor) -> None:
        for _ in comm.gather([wire_B], range(comm.size), wire_B.numel()):
            pass

    verbs: dict[str, Callable[[torch.Tensor], None]] = {"broadcast": comm.broadcast, "gather": gather}
    return verbs if isinstance(comm, Sealed) else verbs | {"reduce": lambda wire_B: comm.reduce(wire_B.view(torch.float32))}


def _measure(comm: Communicator, name: str, call: Callable[[torch.Tensor], None]) -> list[Row]:
    """Time one verb at every size within ``PATIENCE``: the median from a barrier on rank 0 until all ranks are through.

    ``own_seconds`` is when rank 0 itself was through: its kernel may hold what is still to travel.
    """
    rows: list[Row] = []
    for size in SIZES:
        wire_B = torch.zeros(size, dtype=torch.uint8)
        seconds, own = [], []
        for _ in range(1 + REPEATS):  # the first opens connections
            comm.barrier()
            began = time.perf_counter()
            call(wire_B)
            own.append(time.perf_counter() - began)
            comm.barrier()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        figures = {"seconds": median, "own_seconds": statistics.median(own[1:]), "mbyte_per_second": size / median / 1e6}
        rows.append({"verb": name, "bytes": size, **figures})
        if _too_slow(comm, median):
            break
    return rows


def _too_slow(comm: Communicator, seconds: float) -> bool:
    """Whether the next size would take too long, as rank 0 has measured: all ranks must stop at the same one."""
    verdict_B = torch.tensor([seconds * SIZES[-1] / SIZES[-2] > PATIENCE], dtype=torch.uint8)
    comm.broadcast(verdict_B)
    return bool(verdict_B)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _backends(comm: Communicator) -> dict[str, Any]:
    mpi = None
    if comm.name == "mpi":
        from mpi4py import MPI

        mpi = MPI.Get_library_version().split("\n")[0].strip("\0 ")
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": mpi or shutil.which("mpiexec", path=search),
        "mpi_heals": comm.name == "mpi" and ulfm.offered(os.environ),
        "gloo_tls": _gloo_tls(),
    }


def _gloo_tls() -> bool:
    """Whether this torch can encrypt gloo: it refuses the transport by name when TLS is not compiled in."""
    code = "import torch.distributed as d; d.ProcessGroupGloo.create_device(hostname='localhost')"
    environ = os.environ | {"GLOO_DEVICE_TRANSPORT": "TCP_TLS"}
    run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False)
    return "unsupported gloo device" not in run.stderr


def _interfaces() -> list[Row]:
    state = psutil.net_if_stats()
    return [
        {"name": name, "up": state[name].isup, "mbit": state[name].speed, "addresses": [address.address for address in addresses]}
        for name, addresses in psutil.net_if_addrs().items()
        if name in state
    ]


def _own_address(environ: Mapping[str, str]) -> str:
    """Return the address that gloo binds: that of GLOO_SOCKET_IFNAME, else of the host's name."""
    wanted = environ.get("GLOO_SOCKET_IFNAME")
    if wanted:
        known = psutil.net_if_addrs().get(wanted, [])
        return next((entry.address for entry in known if entry.family == socket.AF_INET), f"no address on {wanted}")
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1 (the host's name cannot be resolved)"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _first_line(command: list[str]) -> str | None:
    if not shutil.which(command[0]):
        return None
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip().split("\n")[0]
