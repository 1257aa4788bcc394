"""Top-k updates: what is chosen, what travels, what is refused, what a client keeps, and what a run comes to with and without it."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slora_dist import codec, privacy
from slora_dist.audit.checks import CHECKS
from slora_dist.audit.run import Run
from slora_dist.config import Indices, Values
from slora_dist.errors import ConfigError, RunError
from slora_dist.rounds import training
from slora_dist.support import Slot, Support
from slora_dist.topk import TopK
from slora_dist.upload import wholes
from slora_dist.wire import HEADER_BYTES
from tests.tiny import SHORT, metrics, run, same, tiny

N = 3000
SUPPORT = Support([Slot.whole("a", (40, 50), "value"), Slot.whole("b", (1000,), "head")])
KINDS: tuple[Indices, ...] = ("gap", "gap+zstd", "int32")
FORMATS: tuple[Values, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
every_index = pytest.mark.parametrize("indices", KINDS)
TOP = ("comm.wire.topk=0.1", "comm.wire.indices=gap+zstd")


def some_update(seed: int = 0) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) ** 3


def test_int32_positions_end_at_two_to_the_31() -> None:
    large = Support([Slot.whole("a", (1 << 16, 1 << 15), "value"), Slot.whole("b", (1,), "head")])
    TopK(large, "float32", "gap", 0.02)
    with pytest.raises(ConfigError, match=r"comm.wire.indices: int32 cannot tell 2147483649 coordinates apart.*gap"):
        TopK(large, "float32", "int32", 0.02)


@every_index
@pytest.mark.parametrize("values", FORMATS)
def test_round_trip(values: Values, indices: Indices) -> None:
    wire, update_N = TopK(SUPPORT, values, indices, 0.02), some_update()
    body_B = wire.encode(update_N)
    index_k, values_k = wire.decode(body_B)
    assert wire.k == 60 and torch.equal(index_k, update_N.abs().topk(60).indices.sort().values)
    step = float(update_N.abs().max()) / {"int4": 13, "int8": 250}.get(values, 500)
    torch.testing.assert_close(values_k, update_N[index_k], rtol=0, atol=step)
    assert body_B.numel() <= wire.most and sum(wire.by_kind().values()) == wire.nbytes
    assert wire.varies == (None if indices == "int32" else "index")
    if indices == "int32":
        assert body_B.numel() == wire.nbytes
    else:
        assert math.isclose(body_B.numel(), wire.nbytes, rel_tol=0.25), "an estimate is near for positions at random"


@every_index
@pytest.mark.parametrize("values", FORMATS)
def test_nothing_is_lost_that_is_not_sent_now(values: Values, indices: Indices) -> None:
    """What was sent in all rounds and what is still owed are together the sum of all updates."""
    wire, sent_N, left_N, total_N = TopK(SUPPORT, values, indices, 0.05), torch.zeros(N), torch.zeros(N), torch.zeros(N)
    for number in range(30):
        owed_N = left_N + some_update(number)
        total_N += some_update(number)
        index_k, values_k = wire.decode(wire.encode(owed_N))
        sent_N[index_k] += values_k
        left_N = wire.keep(owed_N, owed_N)
    torch.testing.assert_close(sent_N + left_N, total_N, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("most", [1.0, 60.0, 1e6])
def test_under_a_clip_no_message_is_longer_and_nothing_is_lost_but_what_the_clip_takes(most: float) -> None:
    """``privacy.clip`` bounds what a client's training adds, and each message once more: what that one takes is still owed."""
    wire, state, stage = TopK(SUPPORT, "float32", "gap", 0.1), dict[str, Tensor](), SimpleNamespace(name="sparse")
    sent_N, total_N = torch.zeros(N), torch.zeros(N)
    for number in range(30):
        total_N += privacy.clip(some_update(number), most)
        index_k, values_k = wire.decode(wire.encode(training._owed(wire, stage, some_update(number), state, most)))  # type: ignore[arg-type]
        assert float(values_k.double().norm()) <= most
        sent_N[index_k] += values_k
    (left_N,) = state.values()
    torch.testing.assert_close(sent_N + left_N, total_N, rtol=1e-4, atol=1e-3)


def int32(*positions: int) -> Tensor:
    wire = TopK(SUPPORT, "float32", "int32", len(positions) / N)
    return torch.cat([wire.encode(some_update())[: wire.value_bytes], torch.tensor(positions, dtype=torch.int32).view(torch.uint8)])


@pytest.mark.parametrize("positions", [(1, 1, 5), (5, 4, 9), (-1, 4, 5), (1, 2, N), (2**31 - 1, 5, 6)])
def test_positions_that_do_not_ascend_within_the_support_are_refused(positions: tuple[int, ...]) -> None:
    wire = TopK(SUPPORT, "float32", "int32", 3 / N)
    assert wire.decode(int32(1, 4, 2999))[0].tolist() == [1, 4, 2999]
    with pytest.raises(RunError, match="positions"):
        wire.decode(int32(*positions))


@every_index
def test_what_no_encoder_makes_is_refused(indices: Indices) -> None:
    wire = TopK(SUPPORT, "float32", indices, 0.02)
    body_B = wire.encode(some_update())
    for wrong in (float("nan"), float("inf")):
        spoilt_B = body_B.clone()
        spoilt_B[4:8] = torch.tensor([wrong]).view(torch.uint8)
        with pytest.raises(RunError, match="not finite"):
            wire.decode(spoilt_B)
    for wrong_B in (body_B[:100], body_B[:-1], torch.cat([body_B, body_B[:1]])):
        with pytest.raises(RunError, match=r"positions|position \d+ of"):
            wire.decode(wrong_B)
    if indices == "gap":
        outside_B = torch.cat([body_B[: wire.value_bytes], codec.encode(torch.cat([torch.arange(59), torch.tensor([N])]), N + 1)])
        with pytest.raises(RunError, match="position 3000 of 3000"):
            wire.decode(outside_B)


def test_messages_are_put_together_and_held_to_their_bound() -> None:
    begin, end = torch.zeros(HEADER_BYTES, dtype=torch.uint8), torch.ones(6, dtype=torch.uint8)
    pieces = [(0, 0, begin), (0, HEADER_BYTES, end), (1, 0, begin)]
    assert [(message, len(whole_B)) for message, whole_B in wholes(iter(pieces), 70)] == [(0, 70), (1, 64)]
    with pytest.raises(RunError, match="message 0: more than 69 bytes"):
        list(wholes(iter(pieces), 69))
    with pytest.raises(RunError, match="message 0: 63 bytes, fewer than a header's"):
        list(wholes(iter([(0, 0, begin[1:])]), 100))


@pytest.mark.parametrize(
    ("setting", "overrides"),
    [("indices", ["comm.wire.topk=0.1"]), ("topk", ["comm.wire.topk=0", TOP[1]]), ("topk", ["comm.wire.topk=1.5", TOP[1]])],
)
def test_top_k_needs_positions_of_its_own(setting: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(*overrides)
    assert error.value.setting == f"comm.wire.{setting}"


def test_stopped_and_resumed_a_client_still_owes_what_it_owed(tmp_path: Path) -> None:
    overrides = (*SHORT, *TOP, "comm.wire.values=int8")
    straight, broken = run(tmp_path / "straight", *overrides), run(tmp_path / "broken", *overrides, stop_after=1)
    for last in range(2, 5):
        run(broken.path, resume=True, stop_after=last)
    assert same(straight, broken)
    assert not [fault for check in CHECKS.values() for fault in check(Run(broken)) or ()]


@pytest.mark.parametrize("indices", ["int32", "gap"])
def test_bytes_are_planned_exactly_or_nearly(indices: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *SHORT, "comm.wire.topk=0.1", f"comm.wire.indices={indices}", "clients.steps=1")
    audited = Run(folder)
    planned, counted = audited.plan["payload_bytes"]["up"], folder.summary()["payload_bytes"]["up"]
    assert counted == planned if indices == "int32" else math.isclose(counted, planned, rel_tol=0.1)
    assert all(phase["message_bytes"]["estimated"] == (indices == "gap") for phase in audited.plan["phases"])


def test_error_feedback_reaches_the_loss_of_dense_updates(tmp_path: Path) -> None:
    """A tenth of the coordinates comes within 0.2 nats of all of them in as many rounds, from 1.39; without feedback nothing is learned."""
    learning = ["method.name=sft", "method.sparse.rounds=30", "method.sparse.lr=1e-2", "clients.steps=3", "clients.per_round=6"]

    def loss(name: str, *overrides: str) -> Any:
        return metrics(run(tmp_path / name, *learning, "server.eval_every=0", *overrides))[-1]["loss"]

    dense, fed, unfed = loss("dense"), loss("fed", *TOP), loss("unfed", *TOP, "comm.wire.feedback=false")
    assert dense < 0.1 and fed < dense + 0.2 and unfed > dense + 1.0
