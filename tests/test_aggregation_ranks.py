"""The same bits on one rank and on four under rules that send parts, change the base, hold updates, or let clients keep something."""

from pathlib import Path

from slora_dist.audit.checks import audit
from slora_dist.runfolder import RunFolder
from tests.ranks import run_ranks
from tests.tiny import SHORT, run, same

SIZE, SECONDS = 4, 240.0  # a worker plays two of the four clients of a round, the others one
WORLD = ("clients.per_round=4", "method.sparse.rounds=1", "method.lowrank.rounds=3", "data.limit=64", "clients.count=9")
SGD = ("clients.optimizer=sgd", "method.sparse.lr=0.1", "method.lowrank.lr=0.1")
RUNS = {
    "rolora": ("method.lowrank.rule=rolora",),
    "fedex": ("method.lowrank.rule=fedex", "comm.wire.values=bfloat16"),
    "stack": ("method.lowrank.rule=stack", "server.weighting=examples"),
    "svd": ("method.lowrank.rule=svd",),
    "ranks": ("method.lowrank.rule=stack", "method.lowrank.client_ranks=[4, 2, 1]", "server.weighting=examples"),
    "scaffold": ("clients.scaffold=true", *SGD),
    "keep": ("clients.keep=[factor_b]",),
    "trimmed": ("server.aggregate=trimmed_mean", "server.hostile=1"),
}


def play(rank: int, size: int, folder: str) -> None:
    """Play all runs; under ``stack`` these ranks take over from one that stopped in the middle of the phase."""
    from torch._C._distributed_c10d import FileStore

    from slora_dist.comm.torch_comm import TorchComm

    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS)
    for name, overrides in RUNS.items():
        run(Path(folder) / name, *SHORT, *WORLD, *overrides, comm=comm)
    run(Path(folder) / "moved", resume=True, comm=comm)
    comm.close()


def test_many_ranks_end_in_the_bits_of_one(tmp_path: Path) -> None:
    alone = {name: run(tmp_path / "alone" / name, *SHORT, *WORLD, *overrides) for name, overrides in RUNS.items()}
    run(tmp_path / "moved", *SHORT, *WORLD, *RUNS["stack"], stop_after=2)
    run_ranks(SIZE, play, str(tmp_path), seconds=SECONDS)
    for name in [*RUNS, "moved"]:
        many, one = RunFolder(tmp_path / name), alone["stack" if name == "moved" else name]
        assert same(many, one), name
        assert many.summary()["payload_bytes"]["by_phase"] == one.summary()["payload_bytes"]["by_phase"], name
        told = [fault for check in audit(many) if not check.name.startswith("counters") for fault in check.faults or ()]
        assert told == [], name
