"""A client whose training raises, gives NaN or takes too long is left out of the round, and nothing else changes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slora_dist import client as clients
from slora_dist import upload
from slora_dist.audit import checks
from slora_dist.client import Recipe, Update, attempt, train
from slora_dist.comm.alone import Alone
from slora_dist.comm.metered import Metered
from slora_dist.config import ClientsConfig
from slora_dist.errors import RunError
from slora_dist.exactsum import exact
from slora_dist.fixed import Fixed
from slora_dist.ledger import Label, Ledger
from slora_dist.runfolder import RunFolder
from slora_dist.support import Part, Slot, Support
from slora_dist.topk import TopK
from slora_dist.wire import HEADER_BYTES, Header, Wire
from tests.families import build
from tests.test_client import documents, enter
from tests.tiny import SHORT, metrics, run, tensors

N = 300
SUPPORT = Support([Slot.whole("weight", (N,), "value")])


def delta(client: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(client))


def mean(wire: Any, way: str, reasons: dict[int, str], absent_count: bool = False, **options: Any) -> Tensor:
    """The mean of the updates of clients 0 to 3, of whom some are left out."""
    expected = [Header(client, 0, 1, 0, 0.0, 0.0, wire.nbytes) for client in range(4)]
    label = Label("p", 1, "up", wire.by_kind())
    job = upload.Upload(wire, label, expected, [0] * 4, by_examples=not absent_count, absent_count=absent_count)

    def updates() -> Iterator[tuple[Header, Tensor]]:
        for client in range(4):
            reason = reasons.get(client, "")
            header = Header(client, 0, 1, 0 if reason else 3 + client, 0.5, 0.1, wire.nbytes, reason=reason)
            yield header, torch.zeros(N) if reason else delta(client)

    comm = Metered(Alone(), Ledger(0))
    bring = exact if isinstance(wire, Fixed) else getattr(upload, way)
    received = bring(comm, job, updates(), *([way, options["secure"]] if isinstance(wire, Fixed) else []))
    assert received
    received = upload.joined([(Part(SUPPORT, None), received)], N)
    assert [header.reason for header in received.headers] == [reasons.get(client, "") for client in range(4)]
    return received.mean_N


WAYS: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "gather": (lambda: Wire(SUPPORT, "float32", "implicit"), "gather", {}),
    "int8": (lambda: Wire(SUPPORT, "int8", "implicit"), "gather", {}),
    "reduce": (lambda: Wire(SUPPORT, "float32", "implicit"), "reduce", {}),
    "topk": (lambda: TopK(SUPPORT, "float32", "gap", 0.999), "gather", {}),
    "exact": (lambda: Fixed(SUPPORT, 64), "gather", {"secure": False}),
    "secure": (lambda: Fixed(SUPPORT, 64), "reduce", {"secure": True}),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_mean_is_that_of_the_others(name: str) -> None:
    wire, way, options = WAYS[name]
    found_N = mean(wire(), way, {1: "failed", 3: "late"}, **options)
    reference_N = (3 * delta(0) + 5 * delta(2)) / 8
    torch.testing.assert_close(found_N, reference_N, atol=0.05 if name == "int8" else 1e-2 if name == "topk" else 1e-6, rtol=1e-5)


def test_a_rank_adds_no_update_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client's own look at its update has missed: its rank leaves it out of the sum on the way, and its header says so."""
    honest, wire = delta, Wire(SUPPORT, "float32", "implicit")
    monkeypatch.setattr(f"{__name__}.delta", lambda client: honest(client) / (client != 1))
    comm, job = Metered(Alone(), Ledger(0)), upload.Upload(wire, Label("p", 1, "up", {}), [], [0] * 4, by_examples=True)
    expected = [Header(client, 0, 1, 3, 0.5, 0.1, wire.nbytes) for client in range(4)]
    received = upload.reduce(comm, replace(job, expected=expected), ((header, delta(header.client)) for header in expected))
    assert received and received.left_out == {1: "not finite"} and received.weight == 9
    torch.testing.assert_close(received.mean_N, (delta(0) + delta(2) + delta(3)) / 3)


@pytest.mark.parametrize("name", WAYS)
def test_a_round_that_is_left_with_nobody_ends_the_run(name: str) -> None:
    wire, way, options = WAYS[name]
    with pytest.raises(RunError, match="no client has an update: not finite"):
        mean(wire(), way, dict.fromkeys(range(4), "not finite"), **options)


def test_where_noise_was_measured_for_all_a_client_left_out_counts_as_zero() -> None:
    found_N = mean(Wire(SUPPORT, "float32", "implicit"), "gather", {1: "failed"}, absent_count=True)
    torch.testing.assert_close(found_N, (delta(0) + delta(2) + delta(3)) / 4)


def test_a_header_tells_the_reason_and_no_other() -> None:
    header = Header(2, 0, 1, 0, 0.0, 0.1, 4 * N, reason="late")
    expected = Header(2, 0, 1, 3, 0.0, 0.0, 4 * N)
    assert Header.unpack(header.pack(), expected) == header and header.pack().numel() == HEADER_BYTES
    with pytest.raises(RunError, match="client 2: left out, and trained on 5 examples"):
        Header.unpack(Header(2, 0, 1, 5, 0.0, 0.1, 4 * N, reason="late").pack(), expected)
    with pytest.raises(RunError, match="client 2: trained on no example"):
        Header.unpack(Header(2, 0, 1, 0, 0.0, 0.1, 4 * N).pack(), expected)


def recipe(**settings: Any) -> Recipe:
    return Recipe(ClientsConfig(batch_size=4, epochs=2, **settings), 0.01, False, 0)


@pytest.mark.parametrize("kind", ["sparse", "dense", "lowrank"])
def test_the_next_client_trains_as_if_the_other_had_not_been_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("bert")
    coordinates, start_N = enter(made, kind)
    whole = documents(11, seed=1)
    alone = train(made.net, coordinates, start_N, whole, recipe(), seed=3)
    true, left = made.net.forward, [3]

    def breaking(*args: Any, **batch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("a document of another kind\nand more")
        return true(*args, **batch)

    with monkeypatch.context() as patch:
        patch.setattr(made.net, "forward", breaking)
        broken = attempt(made.net, coordinates, start_N, whole, recipe(), seed=4)
    assert (broken.reason, broken.num_examples, broken.cause) == ("failed", 0, "ValueError: a document of another kind")
    assert not broken.delta_N.any() and broken.delta_N.shape == start_N.shape
    again = attempt(made.net, coordinates, start_N, whole, recipe(), seed=3)
    assert again.reason == "" and torch.equal(again.delta_N, alone.delta_N) and again.loss == alone.loss


def test_numbers_that_are_not_finite_are_no_update() -> None:
    made = build("bert")
    coordinates, start_N = enter(made, "dense")
    endless = Recipe(ClientsConfig(batch_size=4), float("inf"), False, 0)
    bad = attempt(made.net, coordinates, start_N, documents(11, seed=1), endless, seed=3)
    assert bad.reason == "not finite" and not bad.delta_N.any() and bad.loss == 0.0


def test_a_client_that_is_late_stops_after_the_step_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("bert")
    coordinates, start_N = enter(made, "sparse")
    steps = []
    made.net.register_forward_hook(lambda *_: steps.append(1))
    late = attempt(made.net, coordinates, start_N, documents(11, seed=1), recipe(round_deadline=1e-9), seed=3)
    assert late.reason == "late" and "clients.round_deadline is 1e-09 s" in late.cause and len(steps) == 1
    assert attempt(made.net, coordinates, start_N, documents(11, seed=1), recipe(round_deadline=1e9), seed=3).reason == ""


@pytest.mark.parametrize("error", [RunError("rank 1: upload failed"), KeyboardInterrupt()])
def test_what_breaks_the_run_is_not_a_clients_failure(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Update:
        raise error

    monkeypatch.setattr(clients, "train", broken)
    with pytest.raises(type(error)):
        attempt(torch.nn.Linear(1, 1), SUPPORT, torch.zeros(N), documents(3, seed=1), recipe(), seed=3)


def broken_run(out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> RunFolder:
    """A tiny run in which the second client of round 2 fails."""
    true, count = clients.train, [0]

    def breaking(*args: Any) -> Update:
        count[0] += 1
        if count[0] == 5:
            raise OSError("its disk is gone")
        return true(*args)

    with monkeypatch.context() as patch:
        patch.setattr(clients, "train", breaking)
        return run(out, *SHORT, *overrides)


def test_a_run_names_who_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    folder = broken_run(tmp_path / "run", monkeypatch)
    records = folder.lines("metrics")
    left_out = str(records[1]["clients"][1])
    assert [record["left_out"] for record in records] == [{}, {left_out: "failed"}, {}, {}]
    assert folder.summary()["left_out"] == {"failed": 1}
    said = f"slora-dist [rank 0] client {left_out} is left out of round 2: failed (OSError: its disk is gone)"
    captured = capfd.readouterr()
    assert said in captured.err.splitlines() and "left out of a round: 1 failed" in captured.out
    assert not [fault for check in checks.audit(folder) for fault in check.faults or ()]
    whole = run(tmp_path / "whole", *SHORT)
    assert metrics(whole)[0] == metrics(folder)[0] and tensors(whole) != tensors(folder)
    assert tensors(broken_run(tmp_path / "again", monkeypatch)) == tensors(folder)


def test_a_bound_without_noise_does_not_count_who_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = broken_run(tmp_path / "free", monkeypatch, "server.weighting=uniform")
    bounded = broken_run(tmp_path / "bounded", monkeypatch, "server.weighting=uniform", "privacy.clip=1e9")
    assert tensors(free) == tensors(bounded)


def test_who_was_left_out_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of a round are those of all its clients: the late ones are the slowest."""

    def timed(*args: Any) -> Update:
        update = attempt(*args)
        return replace(update, seconds=10.0 if update.reason else 1.0)

    monkeypatch.setattr("slora_dist.rounds.training.attempt", timed)
    record = broken_run(tmp_path / "run", monkeypatch).lines("metrics")[1]
    assert len(record["clients"]) == 3 and list(record["left_out"].values()) == ["failed"]
    assert (record["seconds"]["train"], record["seconds"]["slowest_client"]) == (12.0, 10.0)
