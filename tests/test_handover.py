"""Completion and PiSSA in whole runs: alike on any number of ranks, told in the summary, audited."""

from pathlib import Path

import pytest
from torch._C._distributed_c10d import FileStore

from slora_dist.audit.checks import audit
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.runfolder import RunFolder
from tests.ranks import run_ranks
from tests.tiny import SHORT, run, same

SIZE, SECONDS = 3, 120.0
RUNS = {
    "completion": ("method.lowrank.init=completion", "server.svd=ranks", "method.sparse.density=0.3", "method.lowrank.residual=keep"),
    "entries": ("method.lowrank.init=completion", "method.lowrank.magnitude=entries", "method.sparse.density=0.3"),
    "pissa": ("method.name=lora", "method.lowrank.init=pissa"),
    "anew": ("method.lowrank.init=kaiming", "method.lowrank.residual=keep", "server.svd=ranks"),
}


def play(rank: int, size: int, folder: str) -> None:
    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS)
    for name, overrides in RUNS.items():
        run(Path(folder) / name, *SHORT, *overrides, comm=comm)
    comm.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("many")
    run_ranks(SIZE, play, str(folder), seconds=SECONDS)
    return {name: RunFolder(folder / name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_three_ranks_end_in_the_bits_of_one(name: str, many: dict[str, RunFolder], tmp_path: Path) -> None:
    """One that is stopped at the switch and resumed, at that."""
    one = run(tmp_path / "one", *SHORT, *RUNS[name], stop_after=1)
    for last in (2, 3, None):
        run(one.path, resume=True, stop_after=last)
    assert same(one, many[name])
    assert not [fault for check in audit(many[name]) for fault in check.faults or ()]


def test_the_summary_tells_how_the_factors_began(many: dict[str, RunFolder], tiny_run: RunFolder) -> None:
    told = {name: folder.summary()["switch"] for name, folder in {**many, "svd": tiny_run}.items()}
    assert told.pop("pissa") is None
    assert {name: switch["init"] for name, switch in told.items()} == {
        "completion": "completion", "entries": "completion", "anew": "kaiming", "svd": "svd",
    }  # fmt: skip
    assert told["anew"]["kept_energy"] == {} and told["anew"]["observed_residual_total"] is None
    for name in ("completion", "entries", "svd"):
        shares = told[name]["observed_residual"]
        assert set(shares) == set(told[name]["kept_energy"]) and all(0 < share < 1 for share in shares.values())
        assert min(shares.values()) <= told[name]["observed_residual_total"] <= max(shares.values())
    assert told["entries"]["observed_residual_total"] < told["completion"]["observed_residual_total"], "it is nearer to what was observed"
    assert told["entries"]["kept_energy_total"] == pytest.approx(told["completion"]["kept_energy_total"], rel=0.05)
