import re
from typing import Any

import pytest

from slora_dist.errors import ConfigError
from slora_dist.world import World, check_size, command, detect, hosts, rendezvous

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "j",
    **MASTER,
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[2-3]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
}
ALONE = World(0, 1, 0, 1, "alone")


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, ALONE),
        (TORCHRUN, World(3, 4, 1, 2, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2", **MASTER}, World(1, 2, 0, 1, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0, 1, "torchrun")),
        (OPENMPI, World(2, 4, 0, 2, "openmpi")),
        (MPICH, World(1, 4, 1, 2, "mpich")),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1"}, World(1, 4, 1, 2, "mpich")),
        (SRUN, World(2, 3, 0, 1, "slurm")),
        (SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, World(1, 3, 1, 2, "slurm")),
    ],
)
def test_each_launcher(environ: dict[str, str], world: World) -> None:
    assert detect(environ) == world


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (SRUN | TORCHRUN, "torchrun"),
        (MPICH | TORCHRUN, "torchrun"),
        (SRUN | OPENMPI, "openmpi"),
        (SRUN | MPICH, "mpich"),
        (BATCH | MPICH, "mpich"),
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "3"}, "slurm"),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "2"}, "slurm"),  # srun --mpi=pmix
    ],
)
def test_which_variables_win(environ: dict[str, str], launcher: str) -> None:
    assert detect(environ).launcher == launcher


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "batch"}])
def test_a_batch_script_is_a_world_of_one_unless_it_asked_for_more(step: dict[str, str]) -> None:
    assert detect(BATCH | step) == ALONE
    assert detect(BATCH | step | {"SLURM_NTASKS": "1"}) == ALONE
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS: the allocation has 4 tasks.*srun --ntasks 4 python -m slora_dist train"):
        detect(BATCH | step | {"SLURM_NTASKS": "4"})


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "setting", "typed"),
    [
        (TORCHRUN | {"RANK": "4"}, "RANK", "torchrun --standalone --nproc-per-node 4 -m slora_dist train CONFIG.yaml"),
        (TORCHRUN | {"RANK": "-1"}, "RANK", "torchrun --standalone --nproc-per-node 4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK", "torchrun"),
        (TORCHRUN | {"RANK": "first"}, "RANK", "torchrun"),
        (TORCHRUN | {"MASTER_PORT": "high"}, "MASTER_PORT", "torchrun"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT", "1 to 65535"),
        (without(TORCHRUN, "RANK"), "RANK", "torchrun"),
        (without(TORCHRUN, "WORLD_SIZE"), "WORLD_SIZE", "torchrun"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR", "torchrun"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT", "torchrun"),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "9"}, "OMPI_COMM_WORLD_RANK", "mpiexec -n 4 python -m slora_dist train CONFIG.yaml"),
        (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE", "mpiexec -n"),
        (without(MPICH, "PMI_SIZE"), "PMI_SIZE", "mpiexec -n"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK", "mpiexec -n"),
        (SRUN | {"SLURM_PROCID": "3"}, "SLURM_PROCID", "srun --ntasks 3 python -m slora_dist train CONFIG.yaml"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "0"}, "SLURM_PROCID", "srun --ntasks 1"),
        (SRUN | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID", "srun --ntasks 3"),
    ],
)
def test_contradictions_say_what_to_type(environ: dict[str, str], setting: str, typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(environ)
    assert caught.value.setting == setting
    assert typed in caught.value.allowed


def test_rendezvous_is_the_one_given() -> None:
    assert rendezvous(TORCHRUN, detect(TORCHRUN)) == ("node1", 29500)
    assert rendezvous(MPICH | MASTER, detect(MPICH)) == ("node1", 29500)
    assert rendezvous(SRUN | MASTER, detect(SRUN)) == ("node1", 29500)


def test_rendezvous_of_an_srun_step_is_made_up() -> None:
    assert rendezvous(SRUN, detect(SRUN)) == ("node2", 23456)
    assert rendezvous(SRUN | {"MASTER_PORT": "1234"}, detect(SRUN)) == ("node2", 1234)
    assert rendezvous(SRUN | {"MASTER_ADDR": "", "MASTER_PORT": ""}, detect(SRUN)) == ("node2", 23456)
    assert rendezvous(without(SRUN, "SLURM_STEP_NODELIST"), detect(SRUN)) == ("node1", 23456)


@pytest.mark.parametrize("environ", [MPICH, OPENMPI, without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")])
def test_rendezvous_that_nobody_knows(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR: not set.*MASTER_ADDR=<host of rank 0> MASTER_PORT=29500 (mpiexec|srun)"):
        rendezvous(environ, detect(environ))


@pytest.mark.parametrize(
    ("nodelist", "expanded"),
    [
        ("gpu05", ["gpu05"]),
        ("node[1-3,07],gpu5", ["node1", "node2", "node3", "node07", "gpu5"]),
        ("n[008-011]", ["n008", "n009", "n010", "n011"]),
        ("r[1-2]n[1,3]-ib,x", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib", "x"]),
    ],
)
def test_hosts(nodelist: str, expanded: list[str]) -> None:
    assert hosts(nodelist) == expanded


@pytest.mark.parametrize(
    ("environ", "typed"),
    [
        (SRUN, "srun --mpi=pmi2 --ntasks 3 python"),
        (MPICH, "mpiexec -n 4 python"),
        (OPENMPI, "mpiexec -n 4 python"),
        (TORCHRUN, "comm.backend=gloo"),
        ({}, "mpiexec -n 4 python"),
    ],
)
def test_a_transport_that_sees_another_world(environ: dict[str, str], typed: str) -> None:
    world = detect(environ)
    check_size(world, world.size)
    found = 1 if world.size > 1 else 4
    with pytest.raises(ConfigError, match=rf"comm.backend: .*sees a world of {found}.*{re.escape(typed)}"):
        check_size(world, found)


def test_commands_start_what_they_say() -> None:
    started: dict[str, Any] = {launcher: command(launcher, 3) for launcher in ("torchrun", "slurm", "mpich", "openmpi", "alone")}
    assert all(" 3 " in line and line.endswith("-m slora_dist train CONFIG.yaml") for line in started.values())
