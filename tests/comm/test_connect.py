"""Which transport a run gets, and how the ranks of torchrun, of an srun step and of nobody in particular find each other."""

import socket
import sys
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, TCPStore

from slora_dist.comm import choose, connect, torch_comm
from slora_dist.comm.door import listen
from slora_dist.comm.lifeline import Healing
from slora_dist.comm.mpi_comm import MpiComm
from slora_dist.comm.torch_comm import open_store
from slora_dist.errors import ConfigError, RunError
from slora_dist.world import World, detect
from tests.ranks import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TIMEOUT = 40.0


def world(size: int, launcher: str = "torchrun", local_size: int = 1) -> World:
    return World(0, size, 0, local_size, launcher)


@pytest.mark.parametrize(
    ("backend", "place", "device", "expected"),
    [
        ("auto", world(1, "alone"), CPU, "alone"),
        ("nccl", world(1, "alone"), CPU, "alone"),
        ("gloo", world(1), CPU, "alone"),
        ("auto", world(1, "openmpi"), CPU, "alone"),
        ("auto", world(1, "mpich"), CPU, "alone"),
        ("mpi", world(1, "alone"), CPU, "mpi"),
        ("auto", world(2), CPU, "gloo"),
        ("auto", world(2, "slurm"), CPU, "gloo"),
        ("auto", world(2, "mpich"), CPU, "mpi"),
        ("auto", world(2, "openmpi"), CUDA, "mpi"),
        ("gloo", world(2, "mpich"), CPU, "gloo"),
        ("mpi", world(2, "slurm"), CPU, "mpi"),
        ("auto", world(4, local_size=2), CUDA, "nccl"),
        ("nccl", world(4, local_size=2), CUDA, "nccl"),
        ("auto", world(4, local_size=3), CUDA, "gloo"),
        ("gloo", world(4, local_size=2), CUDA, "gloo"),
    ],
)
def test_choose(backend: str, place: World, device: torch.device, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose(backend, place, device) == expected


@pytest.mark.parametrize(("local_size", "device", "problem"), [(1, CPU, "this rank trains on cpu"), (3, CUDA, "two ranks on one GPU")])
def test_nccl_needs_a_gpu_for_every_rank(local_size: int, device: torch.device, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=problem) as caught:
        choose("nccl", world(4, local_size=local_size), device)
    assert caught.value.setting == "comm.backend"


def test_ranks_that_each_see_one_gpu_may_take_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose("nccl", world(2, local_size=2), CUDA) == "nccl" and choose("auto", world(2, local_size=2), CUDA) == "gloo"


def test_ranks_of_two_backends_do_not_wait_for_each_other() -> None:
    store = HashStore()
    store.set("here/1", "nccl")
    with pytest.raises(ConfigError, match=r"^comm\.backend: rank 0 takes gloo and rank 1 nccl"):
        torch_comm.TorchComm("gloo", 0, 2, store, TIMEOUT)


def test_a_world_of_one_needs_nothing() -> None:
    assert connect("auto", detect({}), {}, TIMEOUT, CPU).name == "alone"


@pytest.mark.parametrize("missing", ["mpi4py", "mpi4py.MPI"], ids=["mpi4py", "libmpi"])
def test_mpi_that_is_not_installed_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'slora-dist\[mpi\]'") as caught:
        MpiComm(world(2, "mpich"), TIMEOUT)
    assert caught.value.setting == "comm.backend"


def test_mpi_takes_in_no_new_process() -> None:
    with pytest.raises(ConfigError, match="--join: MPI takes no new process"):
        connect("mpi", world(2, "openmpi"), {}, TIMEOUT, CPU, Healing(TIMEOUT, b"", b"", lambda *_: None, joins=True))


@pytest.mark.parametrize(
    ("backend", "environ", "said"),
    [
        ("gloo", {"TORCHELASTIC_RUN_ID": "x"}, "torchrun's agent ends all ranks when one dies"),
        ("gloo", {"SLURM_KILL_BAD_EXIT": "1"}, "srun (SLURM_KILL_BAD_EXIT) ends all ranks when one dies"),
        ("nccl", {}, "nccl cannot form a new group"),
        ("gloo", {}, ""),
    ],
    ids=["torchrun", "srun", "nccl", "gloo"],
)
def test_where_ranks_cannot_heal_it_is_said(
    backend: str, environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("open_store", "open_lifeline", "TorchComm"):
        monkeypatch.setattr(torch_comm, name, lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    healing = Healing(TIMEOUT, b"", b"", lambda *_: None, joins=False)
    connect(backend, world(2), environ | _master(1), TIMEOUT, CUDA, healing)
    told = capsys.readouterr().err
    assert (said in told and "clients.min_clients has no effect" in told) if said else not told


def test_gloo_in_an_mpi_world_needs_a_place_to_meet() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=<host of rank 0> MASTER_PORT=29500 mpiexec -n 2 ") as caught:
        connect("gloo", world(2, "mpich"), {}, TIMEOUT, CPU)
    assert caught.value.setting == "MASTER_ADDR"


def test_the_agents_store_serves_every_restart() -> None:
    """As torchrun has it: the agent's store stays, while the ranks of the first attempt are gone and their addresses with them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restarts in range(2):
        shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        assert run_ranks(2, _torchrun, shared | _master(store.port)) == [("gloo", restarts), ("gloo", restarts)]


def _torchrun(rank: int, size: int, shared: dict[str, str]) -> Any:
    environ = shared | {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    return _say(environ, int(shared["TORCHELASTIC_RESTART_COUNT"]))


def test_rank_0_of_a_step_serves_the_store() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert run_ranks(3, _step, _master(port)) == [("gloo", 17)] * 3


@pytest.mark.parametrize(
    ("host", "local_size", "listens"),
    [("127.0.0.1", 2, "127.0.0.1"), ("127.0.0.1", 1, "0.0.0.0"), ("192.0.2.1", 1, "0.0.0.0")],
    ids=["told", "loopback, but ranks elsewhere", "a relay's address"],
)
def test_the_store_listens_where_it_is_told(host: str, local_size: int, listens: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.socket(fileno=listen(host, port, World(0, 2, 0, local_size, "slurm"))) as door:
        assert door.getsockname() == (listens, port)


def test_the_stores_socket_is_the_one_that_was_opened_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    held = open_store("127.0.0.1", port, World(0, 2, 0, 2, "slurm"), {})
    held.set("a", "b")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # a store left to itself answers there, too


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 80])
def test_a_name_that_leads_nowhere_is_said(host: str) -> None:
    with pytest.raises(RunError, match=f"rank 0: connect failed: cannot listen at {host}: the name leads nowhere .*MASTER_ADDR"):
        open_store(host, 29500, World(0, 2, 0, 1, "slurm"), {})


def test_a_port_in_use_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"rank 0: connect failed: cannot listen at 127.0.0.1:{port}"):
            open_store("127.0.0.1", port, World(0, 2, 0, 2, "slurm"), {})


def _step(rank: int, size: int, shared: dict[str, str]) -> Any:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    return _say(shared | step, 17)


def _master(port: int) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _say(environ: dict[str, str], word: int) -> tuple[str, int]:
    """Connect as the environment says, and return what rank 0 broadcasts."""
    place = detect(environ)
    comm = connect("auto", place, environ, TIMEOUT, CPU)
    wire_B = torch.full((5,), word if place.rank == 0 else 99, dtype=torch.uint8)
    comm.broadcast(wire_B)
    comm.close()
    return comm.name, int(wire_B[4])
