"""Masks that follow the clients' gradients. Legend: M entries of all masked tensors."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from slora_dist import fisher, methods
from slora_dist.audit.checks import audit
from slora_dist.client import Update
from slora_dist.config import MethodConfig, SparsePhase
from slora_dist.data.tokens import batches, order
from slora_dist.fisher import Selection, selection, squared_gradients
from slora_dist.runfolder import RunFolder
from slora_dist.seeding import derive
from slora_dist.support import Slot
from tests.families import FAMILIES, build
from tests.ranks import run_ranks
from tests.test_client import documents
from tests.tiny import SHORT, run, same

SECONDS = 120.0
GRADIENT = (*SHORT, "method.name=sft", "method.sparse.mask=gradient", "method.sparse.rounds=3", "method.sparse.scope=targets")


def selected(family: str, scope: str = "all") -> tuple[SparsePhase, Selection]:
    phase = SparsePhase(density=0.1, mask="gradient", scope=scope)  # type: ignore[arg-type]
    found = selection(phase, methods.support(phase, build(family), MethodConfig(), 0))
    assert found
    return phase, found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_mean_of_squared_gradients_of_single_documents(family: str) -> None:
    """Of ``count`` documents that the seed draws; against plain torch, without dropout, in the model's own layers."""
    net, every = build(family).net, documents(9, 1)
    scores = selected(family)[1].scores
    update = squared_gradients(net, scores, every, 4, 0, 5)
    wanted_M = torch.zeros(scores.numel)
    net.eval()
    for batch in batches(every, 1, 0, order(9, derive(5, "mask"))[:4]):
        net.zero_grad()
        net(**batch).loss.backward()
        grads = [net.get_parameter(slot.name).grad for slot in scores.slots]
        gradient_M = [torch.zeros(slot.count) if g is None else g.flatten() for slot, g in zip(scores.slots, grads, strict=True)]
        wanted_M += torch.cat(gradient_M) ** 2
    assert update.num_examples == 4 and update.loss > 0
    torch.testing.assert_close(update.delta_N, wanted_M / 4, atol=1e-8, rtol=1e-3)
    assert squared_gradients(net, scores, every, 50, 0, 5).num_examples == 9


@pytest.mark.parametrize("scope", ["all", "targets"])
def test_the_scores_are_those_of_what_the_mask_covers(scope: str) -> None:
    phase, found = selected("bert", scope)
    slots = [slot for slot in methods.support(phase, build("bert"), MethodConfig(), 0).slots if slot.kind == "value"]
    assert [slot.name for slot in found.scores.slots] == [slot.name for slot in slots]
    assert found.up == {"fisher": 4 * found.scores.numel}


@pytest.mark.parametrize(("count", "nbytes"), [(3, 12), (250, 125)], ids=["positions", "bits"])
def test_the_mask_travels_in_the_shorter_form_and_says_the_largest_scores(count: int, nbytes: int) -> None:
    found = Selection([Slot("a", (20, 30), "value", count), Slot("b", (400,), "value", 0 if count == 3 else 4)])
    fisher_M = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    mask_B = found.choose(fisher_M)
    assert mask_B.dtype == torch.uint8 and mask_B.numel() == nbytes == sum(found.down.values())
    read = found.read(mask_B)
    for name, scores_M in (("a", fisher_M[:600]), ("b", fisher_M[600:])):
        kept = len(read[name])
        assert read[name].tolist() == sorted(scores_M.topk(kept).indices.tolist())
    assert len(read["a"]) == count


def test_a_client_that_fails_while_it_scores_is_left_out_of_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The mask is that of the others, and the accounts agree."""
    true, count = fisher.squared_gradients, itertools.count()

    def breaking(*args: Any) -> Update:
        if next(count) == 1:
            raise OSError("its disk is gone")
        return true(*args)

    whole = run(tmp_path / "whole", *GRADIENT)
    monkeypatch.setattr(fisher, "squared_gradients", breaking)
    folder = run(tmp_path / "run", *GRADIENT)
    left_out = folder.lines("metrics")[0]["clients"][1]
    assert f"client {left_out} is left out of the choice of the mask: failed (OSError: its disk is gone)" in capfd.readouterr().err
    assert [record["left_out"] for record in folder.lines("metrics")] == [{}] * 3 and not same(whole, folder)
    assert [fault for check in audit(folder) for fault in check.faults or ()] == []


def play(rank: int, size: int, folder: str) -> None:
    from torch._C._distributed_c10d import FileStore

    from slora_dist.comm.torch_comm import TorchComm

    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS)
    run(Path(folder) / "many", *GRADIENT, comm=comm)
    run(Path(folder) / "moved", resume=True, comm=comm)
    comm.close()


def test_any_number_of_ranks_and_any_interruption_give_the_same_mask_and_bits(tmp_path: Path) -> None:
    """The mask is chosen once: ranks that come later are told it. The accounts of all runs agree, the messages of the mask included."""
    alone = run(tmp_path / "alone", *GRADIENT)
    run(tmp_path / "moved", *GRADIENT, stop_after=1)
    run_ranks(3, play, str(tmp_path), seconds=SECONDS)
    random = run(tmp_path / "random", *GRADIENT, "method.sparse.mask=random")
    assert same(alone, RunFolder(tmp_path / "many")) and same(alone, RunFolder(tmp_path / "moved")) and not same(alone, random)
    for name in ("alone", "many", "moved"):
        assert [fault for check in audit(RunFolder(tmp_path / name)) for fault in check.faults or ()] == []
    moved, plain = (folder.summary()["payload_bytes"] for folder in (alone, random))
    kinds = [line["bytes_by_kind"] for line in alone.lines("ledger")]
    scores, mask = (sum(by_kind.get(kind, 0) for by_kind in kinds) for kind in ("fisher", "mask"))
    assert moved["up"] == plain["up"] + scores and moved["down"] == plain["down"] + mask and scores > mask > 0
