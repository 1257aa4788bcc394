"""What all tests share: one thread (sums depend on it, and tests compare bits), and one finished tiny run."""

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from slora_dist.runfolder import RunFolder

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # read when numpy and torch are loaded, so they are imported later


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave signals to pytest, whose process plays runs of the command line."""
    monkeypatch.setattr("slora_dist.cli.speak_when_ended", lambda *_: None)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> "RunFolder":
    """``configs/tiny.yaml`` as a world of one plays it, from start to end. To be read only."""
    from tests.tiny import run

    return run(tmp_path_factory.mktemp("tiny") / "run")
