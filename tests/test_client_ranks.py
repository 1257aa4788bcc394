"""Clients of different ranks: what each of them has, trains, sends and is sent, and what comes of it.

Legend: N coordinates, O/I out/in features, R rank.
"""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slora_dist import upload
from slora_dist.aggregate.factors import Pair
from slora_dist.aggregate.mean import Kept
from slora_dist.audit.checks import audit
from slora_dist.config import LowrankPhase, Rule
from slora_dist.errors import ConfigError, RunError
from slora_dist.exchange import Exchange
from slora_dist.roundplan import sample
from slora_dist.runfolder import RunFolder
from slora_dist.support import KINDS, Part, Slot, Support
from slora_dist.upload import Received
from slora_dist.wire import Header
from tests.tiny import SHORT, run, same, tiny

RANKS = (8, 4, 2)
OWN = {8: (8, 5), 4: (4, 3), 2: (2, 2)}  # of the factors of rank 8, and of those of rank 5: the same share, rounded up
SHAPES = {"wide": (6, 20, 8), "tall": (9, 7, 5)}  # O, I, R
HEAD, FIRST, ROUNDS = 3, 3, 8
CLIENTS = ("clients.count=9", "clients.per_round=4")
SUPPORT = Support(
    [Slot.whole("head", (HEAD,), "head")]
    + [Slot.whole(f"{name}.a", (rank, into), "factor_a") for name, (_, into, rank) in SHAPES.items()]
    + [Slot.whole(f"{name}.b", (out, rank), "factor_b") for name, (out, _, rank) in SHAPES.items()]
)


def exchange(rule: Rule) -> Exchange:
    spans = {slot.name: span for slot, span in SUPPORT.spans()}
    pairs = [Pair(name, spans[f"{name}.a"], spans[f"{name}.b"], rank, 1.0) for name, (_, _, rank) in SHAPES.items()]
    return Exchange(tiny(*CLIENTS), LowrankPhase(rounds=ROUNDS, rule=rule, client_ranks=list(RANKS)), FIRST, SUPPORT, pairs)


def factors_of(client: int) -> int:
    """Numbers in the factors of a client."""
    owned = zip(SHAPES.values(), OWN[RANKS[client % 3]], strict=True)
    return sum(rank * (out + into) for (out, into, _), rank in owned)


def places(part: Part) -> list[int]:
    return list(range(part.support.numel)) if part.index_n is None else part.index_n.tolist()


def test_a_client_has_the_leading_rows_of_a_and_columns_of_b() -> None:
    value_N = exchange("svd").held_by(1).only(torch.ones(SUPPORT.numel))
    named = SUPPORT.densify(value_N)
    for (name, _), rank in zip(SHAPES.items(), OWN[4], strict=True):
        assert named[f"{name}.a"][:rank].all() and not named[f"{name}.a"][rank:].any()
        assert named[f"{name}.b"][:, :rank].all() and not named[f"{name}.b"][:, rank:].any()
    assert named["head"].all()


@pytest.mark.parametrize("rule", ["fedavg", "svd", "stack"])
def test_each_client_is_sent_what_it_has_and_sends_as_much(rule: Rule) -> None:
    messages = exchange(rule)
    for number in messages.numbers():
        chosen, fresh = sample(tiny(*CLIENTS), number), rule == "stack" and number > FIRST
        assert sorted(client for message in messages.up(number) for client in message.clients) == list(chosen)
        for client in chosen:
            down = [place for message in messages.down(number) if client in message.clients for place in places(message.part)]
            own = places(messages.held_by(client))
            assert sorted(down) == (places(SUPPORT.part(("head",))) if fresh else own)
            (up,) = [message for message in messages.up(number) if client in message.clients]
            assert places(up.part) == own and up.wires.up.nbytes == 4 * (factors_of(client) + HEAD)
            assert messages.up_from(number, client).wires is up.wires
    assert {up for up, _ in messages.faithful()} == {4 * (factors_of(0) + HEAD)}


def test_a_fold_is_as_wide_as_the_factors_of_the_rounds_clients_together() -> None:
    messages = exchange("stack")
    for number in messages.numbers():
        (message,) = messages.folds(number)
        assert message.wires.down.nbytes == 4 * sum(factors_of(client) for client in sample(tiny(*CLIENTS), number))
        assert message.clients == tuple(range(9))


def adapter(folder: RunFolder) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder.adapter / "adapter_model.safetensors")
    return tensors


def test_clients_of_half_the_rank_train_what_a_run_of_half_the_rank_does(tmp_path: Path) -> None:
    """The other half stays where the phase began: there a run ends whose steps are too small to count."""
    more = ("clients.optimizer=sgd", "method.sparse.lr=0.1", "method.lowrank.lr=0.1", "clients.weight_decay=0.1", "clients.prox=0.1")
    half = adapter(run(tmp_path / "half", *SHORT, *more, "method.lowrank.rank=2"))
    some = adapter(run(tmp_path / "some", *SHORT, *more, "method.lowrank.client_ranks=[2]"))
    start = adapter(run(tmp_path / "start", *SHORT, *more, "method.lowrank.lr=1e-30"))
    for name, factor in half.items():
        if "lora_" in name:
            axis = int("lora_B" in name)
            torch.testing.assert_close(some[name].narrow(axis, 0, 2), factor, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(some[name].narrow(axis, 2, 2), start[name].narrow(axis, 2, 2), atol=1e-25, rtol=0)


@pytest.mark.parametrize("rule", ["fedavg", "svd", "stack"])
def test_clients_that_all_have_the_whole_rank_change_no_bit(rule: Rule, tmp_path: Path) -> None:
    plain, ranked = (
        run(tmp_path / str(at), *SHORT, f"method.lowrank.rule={rule}", *more)
        for at, more in enumerate([(), ("method.lowrank.client_ranks=[4]",)])
    )
    assert same(plain, ranked)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.lowrank.ranks={pooler.dense: 6}", "comm.wire.values=int8", "method.lowrank.residual=keep"),
        ("comm.wire.topk=0.2", "comm.wire.indices=gap", "comm.wire.feedback=false", "method.lowrank.rule=svd", "clients.away={0: [3]}"),
    ],
    ids=["int8", "topk"],
)
def test_other_wires_are_accounted_for_and_resumed_to_the_bit(overrides: tuple[str, ...], tmp_path: Path) -> None:
    more = (*SHORT, "method.lowrank.client_ranks=[4, 1, 3]", *overrides)
    straight, broken = run(tmp_path / "straight", *more), run(tmp_path / "broken", *more, stop_after=3)
    run(broken.path, resume=True)
    assert same(straight, broken)
    assert [fault for folder in (straight, broken) for check in audit(folder) for fault in check.faults or ()] == []


def received(update_n: Tensor, clients: list[int], sound: bool) -> Received:
    """What a message for ``clients`` brought, who all send the same; their weights are their numbers."""
    kept = Kept(len(update_n))
    for client in clients:
        kept.count(client * sound)
        kept.add(0, update_n, client)
    reasons = {} if sound else dict.fromkeys(clients, "late")
    headers = [Header(client, 0, 1, client * sound, 0.5, 0.1, 0, reason=reasons.get(client, "")) for client in clients]
    return Received(headers, kept.result(), kept.weight, 0.5, kept, reasons)


def test_uploads_are_joined_in_client_order_and_a_rank_without_a_sound_client_counts_for_nothing() -> None:
    halves = [SUPPORT.part(KINDS, (Fraction(0), Fraction(share))) for share in ("1/4", "1/2", "1")]
    ones = [torch.ones(half.support.numel) for half in halves]
    found = [received(ones[0], [1, 7], True), received(ones[1], [2], False), received(ones[2], [3, 4], True)]
    joined = upload.joined(list(zip(halves, found, strict=True)), SUPPORT.numel)
    assert [header.client for header in joined.headers] == [1, 2, 3, 4, 7] and joined.left_out == {2: "late"}
    torch.testing.assert_close(joined.mean_N, (8 * halves[0].only(torch.ones(SUPPORT.numel)) + 7) / 15)
    assert joined.weight == 15 and joined.kept and torch.equal(joined.mean_N, joined.kept.result())
    assert joined.sound()[:2] == ([1, 3, 4, 7], [1, 3, 4, 7])
    with pytest.raises(RunError, match="no client has an update: late"):
        upload.joined([(halves[0], received(ones[0], [1], False)), (halves[1], received(ones[1], [2], False))], SUPPORT.numel)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.lowrank.client_ranks=[4, 5]",),
        ("method.lowrank.rule=fedex",),
        ("method.lowrank.rule=ffa",),
        ("method.name=lora", "method.lowrank.init=pissa"),
        ("comm.collective=reduce",),
        ("comm.sum=exact", "comm.secure=true"),
        ("server.aggregate=median",),
        ("clients.keep=[factor_b]",),
        ("clients.scaffold=true", "clients.optimizer=sgd"),
        ("privacy.clip=1.0", "privacy.noise_multiplier=1.0"),
    ],
    ids=lambda overrides: overrides[-1],
)
def test_what_needs_updates_of_one_size_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny("method.lowrank.client_ranks=[4, 2]", *overrides)
    assert raised.value.setting == "method.lowrank.client_ranks"
