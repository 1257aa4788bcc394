"""The doctor measures every verb, and advises only what its findings say."""

from typing import Any

import pytest
import torch

from slora_dist import doctor
from slora_dist.cli import main
from slora_dist.comm.alone import Alone
from slora_dist.comm.sealed import Sealed
from slora_dist.world import World
from tests.tiny import TINY

HEALTHY: dict[str, Any] = {
    "versions": {"mpi4py": "4.1"},
    "world": {"size": 3, "transport": "gloo", "launcher": "torchrun"},
    "ranks": [{"rank": rank, "host": f"node{rank}", "address": f"10.0.0.{rank}", "device": "cpu", "cores": 1} for rank in range(3)],
}


def test_a_world_of_one_is_examined_and_told_how_to_measure_more() -> None:
    found = doctor.examine(Alone(), World(0, 1, 0, 1, "alone"), {}, torch.device("cpu"))
    assert found
    assert {(row["verb"], row["bytes"]) for row in found["verbs"]} == {
        (verb, size) for verb in ("broadcast", "gather", "reduce") for size in doctor.SIZES
    }
    assert found["versions"]["torch"] == torch.__version__
    assert any("torchrun --standalone" in line for line in found["advice"])


def test_sealed_verbs_are_measured_and_sums_are_none_of_them() -> None:
    found = doctor.examine(Sealed(Alone(), bytes(32)), World(0, 1, 0, 1, "alone"), {}, torch.device("cpu"))
    assert found and {row["verb"] for row in found["verbs"]} == {"broadcast", "gather"}


def test_nothing_to_mend() -> None:
    assert doctor.advise(HEALTHY, {}) == []


@pytest.mark.parametrize(
    ("change", "environ", "words"),
    [
        (
            {"ranks": [*HEALTHY["ranks"][:2], HEALTHY["ranks"][2] | {"address": "127.0.1.1"}]},
            {},
            "node2 resolves its own name to 127.0.1.1",
        ),
        ({"ranks": [row | {"host": "one", "cores": 1} for row in HEALTHY["ranks"]]}, {}, "3 ranks train on 1 cores"),
        ({"ranks": [row | {"host": "one", "device": "cuda:0"} for row in HEALTHY["ranks"]]}, {}, "share 1 GPU"),
        ({"versions": {"mpi4py": None}}, {}, "slora-dist[mpi]"),
        ({}, {"OMP_NUM_THREADS": "8"}, "run.threads decides"),
        ({"ranks": [row | {"host": "one", "cores": 8} for row in HEALTHY["ranks"]]}, {}, "run.threads=2 would"),
    ],
)
def test_advice(change: dict[str, Any], environ: dict[str, str], words: str) -> None:
    (line,) = doctor.advise(HEALTHY | change, environ)
    assert words in line


def test_threads_that_a_run_has_are_not_advised() -> None:
    found = HEALTHY | {"ranks": [row | {"host": "one", "cores": 8} for row in HEALTHY["ranks"]]}
    assert doctor.advise(found, {}, threads=2) == []


def test_a_config_chooses_the_transport_and_the_threads_that_were_set_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor sets the run's threads itself: what stood in the environment before is what it judges."""
    asked: dict[str, Any] = {}

    def connect(backend: str, *_: object) -> Alone:
        asked["backend"] = backend
        return Alone()

    def examine(_: object, __: object, environ: dict[str, str], *___: object) -> None:
        asked["threads"] = environ["OMP_NUM_THREADS"]

    monkeypatch.setattr("slora_dist.comm.connect", connect)
    monkeypatch.setattr("slora_dist.doctor.examine", examine)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "8")
    assert main(["doctor", str(TINY), "comm.backend=mpi"]) == 0
    assert asked == {"backend": "mpi", "threads": "8"}
    assert main(["doctor", str(TINY), "comm.backend=mpi", "--backend", "gloo"]) == 0
    assert asked["backend"] == "gloo"
