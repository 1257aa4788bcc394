"""Both ways up give the mean of the same updates; ``auto`` takes one of them on every rank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from slora_dist import upload
from slora_dist.comm.alone import Alone
from slora_dist.comm.metered import Metered
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.ledger import Label, Ledger
from slora_dist.support import Slot, Support
from slora_dist.wire import Header, Wire
from tests.ranks import run_ranks

CLIENTS, EXAMPLES = (3, 5, 6, 9), (7, 1, 2, 5)
N = 1000


def _delta(client: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(client))


def _reference(by_examples: bool) -> Tensor:
    weights = torch.tensor(EXAMPLES if by_examples else [1] * len(CLIENTS), dtype=torch.float64)
    deltas = torch.stack([_delta(client).double() for client in CLIENTS])
    return (weights[:, None] * deltas).sum(0) / weights.sum()


def _play(metered: Metered, way: str, by_examples: bool) -> dict[str, Any] | None:
    ranks = [1 + at % (metered.size - 1) if metered.size > 1 else 0 for at in range(len(CLIENTS))]
    wire = Wire(Support([Slot.whole("weight", (N,), "value")]), "float32", "implicit")
    expected = [Header(client, 0, 1, 0, 0.0, 0.0, wire.nbytes) for client in CLIENTS]
    job = upload.Upload(wire, Label("dense", 1, "up", wire.by_kind()), expected, ranks, by_examples)

    def updates() -> Iterator[tuple[Header, Tensor]]:
        for client, examples, rank in zip(CLIENTS, EXAMPLES, ranks, strict=True):
            if rank == metered.rank:
                yield Header(client, 0, 1, examples, 0.5, 0.1, wire.nbytes), _delta(client)

    received = getattr(upload, way)(metered, job, updates())
    if received is None:
        return None
    return {"mean": received.mean_N.tolist(), "clients": [header.client for header in received.headers]}


def _rank(rank: int, size: int, meeting: str) -> dict[str, Any]:
    comm = Metered(TorchComm("gloo", rank, size, FileStore(meeting, size), 60.0), Ledger(rank))
    played = {f"{way}-{by}": _play(comm, way, by) for way in ("gather", "reduce") for by in (False, True)}
    wire = Wire(Support([Slot.whole("weight", (N,), "value")]), "float32", "implicit")
    choice = upload.choose(comm, wire, "dense", 1)
    noted = [(entry.op, *entry.label.by_kind) for entry in comm.ledger.take()]
    comm.comm.close()
    return {"played": played, "choice": choice, "noted": noted}


def test_gather_and_reduce_agree_with_the_mean_on_three_ranks(tmp_path: Path) -> None:
    results = run_ranks(3, _rank, str(tmp_path / "meet"))
    assert len({result["choice"] for result in results}) == 1
    for name, received in results[0]["played"].items():
        assert received["clients"] == list(CLIENTS)
        reference = _reference(name.endswith("True"))
        torch.testing.assert_close(torch.tensor(received["mean"], dtype=torch.float64), reference, atol=1e-6, rtol=1e-5)
    assert all(received is None for result in results[1:] for received in result["played"].values())
    assert {("reduce", "value"), ("gather", "probe"), ("reduce", "probe")} <= set(results[1]["noted"])


def test_gather_is_bitwise_the_same_alone_and_on_ranks(tmp_path: Path) -> None:
    alone = _play(Metered(Alone(), Ledger(0)), "gather", True)
    assert run_ranks(2, _rank, str(tmp_path / "meet"))[0]["played"]["gather-True"] == alone


def test_a_world_of_one_need_not_choose() -> None:
    wire = Wire(Support([Slot.whole("weight", (N,), "value")]), "float32", "implicit")
    assert upload.choose(Metered(Alone(), Ledger(0)), wire, "dense", 1) == "gather"
