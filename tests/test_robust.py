"""What hostile and broken clients can do to each aggregate, and that they are named. Legend: N coordinates, K clients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slora_dist import client
from slora_dist.aggregate.mean import Kept, Mean
from slora_dist.aggregate.robust import aggregate, krum
from slora_dist.errors import ConfigError, RunError
from slora_dist.runfolder import RunFolder
from tests.tiny import SHORT, run, tiny

N, HONEST, F = 400, 7, 2
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum")
ATTACKS = {
    "garbage": lambda draw: 1e8 * torch.randn(N, generator=draw),
    "pull": lambda draw: torch.full((N,), 50.0),
    "sign": lambda draw: -30.0 * honest()[0],
    "huge": lambda draw: torch.full((N,), 3e38),
}


def honest() -> list[Tensor]:
    """Updates around a common one."""
    draw = torch.Generator().manual_seed(1)
    common_N = torch.randn(N, generator=draw)
    return [common_N + 0.3 * torch.randn(N, generator=draw) for _ in range(HONEST)]


def attacked(attack: str) -> tuple[list[Tensor], list[int]]:
    """(updates with two hostile ones among them, the places of these)."""
    draw, updates = torch.Generator().manual_seed(2), honest()
    for at in (0, 4):
        updates.insert(at, ATTACKS[attack](draw))
    return updates, [0, 4]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", ROBUST)
def test_hostile_clients_do_not_move_it_beyond_the_honest_ones(rule: Any, attack: str) -> None:
    """Every coordinate stays between the least and the largest honest value; whoever is far off is named."""
    updates, places = attacked(attack)
    found, honest_KN = aggregate(rule, updates, F), torch.stack(honest())
    assert bool((found.mean_N >= honest_KN.amin(0)).all() and (found.mean_N <= honest_KN.amax(0)).all())
    assert set(places) == set(found.distrusted)
    assert (torch.stack(updates).mean(0) - honest_KN.mean(0)).abs().max() > 5, "the mean is moved"


def test_krum_is_an_honest_update_and_multi_krum_their_mean() -> None:
    updates, places = attacked("garbage")
    assert any(torch.equal(aggregate("krum", updates, F).mean_N, one_N) for one_N in honest())
    torch.testing.assert_close(aggregate("multi_krum", updates, F).mean_N, torch.stack(honest()).mean(0), atol=1e-6, rtol=1e-5)
    assert set(krum(updates, F)[-F:]) == set(places)


def test_krum_scores_by_the_nearest_others() -> None:
    """On a line: 0, 1, 2 and 10 with f = 1 have as nearest neighbour one at a distance of 1, 1, 1 and 8."""
    assert krum([torch.tensor([x]) for x in (10.0, 2.0, 0.0, 1.0)], 1) == [1, 2, 3, 0]


def test_without_hostile_clients_median_and_trimmed_mean_are_the_textbooks() -> None:
    stacked_KN = torch.stack(honest())
    assert torch.equal(aggregate("median", honest(), 0).mean_N, stacked_KN.median(0).values)
    torch.testing.assert_close(aggregate("trimmed_mean", honest(), 0).mean_N, stacked_KN.mean(0), atol=1e-6, rtol=1e-5)
    trimmed_N = stacked_KN.sort(0).values[2:-2].mean(0)
    torch.testing.assert_close(aggregate("trimmed_mean", honest(), 2).mean_N, trimmed_N, atol=1e-6, rtol=1e-5)
    assert torch.equal(aggregate("median", honest()[:2], 0).mean_N, stacked_KN[:2].mean(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, N // 2, N - 1])
@pytest.mark.parametrize("step", [90, N])
@pytest.mark.parametrize("kind", [Mean, Kept])
def test_an_update_that_is_not_finite_is_as_if_it_were_not_there(kind: Any, step: int, where: int, bad: float) -> None:
    """Bit for bit, though half of it may have been added by then."""
    spoiled_N = honest()[0].clone()
    spoiled_N[where] = bad
    with_it, without = kind(N), kind(N)
    for at, update_N in enumerate([honest()[1], spoiled_N, *honest()[2:]]):
        for total in (with_it, without) if at != 1 else (with_it,):
            total.count(at + 1.0)
            for start in range(0, N, step):
                total.add(start, update_N[start : start + step], at + 1.0)
    assert torch.equal(with_it.result(), without.result())
    assert with_it.refused == [1] and without.refused == []


def spoil(monkeypatch: pytest.MonkeyPatch, value: float, *, everybody: bool = False) -> None:
    """Let whoever trains second in a round end with an update full of ``value``."""
    trained, honestly = [0], client.train

    def train(*args: Any) -> client.Update:
        trained[0] += 1
        update = honestly(*args)
        bad = everybody or trained[0] % 6 == 2
        return replace(update, delta_N=torch.full_like(update.delta_N, value)) if bad else update

    monkeypatch.setattr(client, "train", train)


SIX = (*SHORT, "clients.per_round=6", "method.sparse.rounds=1", "method.lowrank.rounds=1", "data.limit=48")
TOP = ("comm.wire.topk=0.1", "comm.wire.indices=gap")
BROKEN = {
    "mean": (),
    "int8": ("comm.wire.values=int8",),
    "top-k": TOP,
    "reduce": ("comm.collective=reduce",),
    "exact": ("comm.sum=exact",),
    "krum": ("server.aggregate=krum", "server.hostile=1"),
    "stack": ("method.lowrank.rule=stack",),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_goes_on_without_a_client_that_sends_nan(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, float("nan"))
    folder = run(tmp_path / "run", *SIX, *BROKEN[name])
    for line in folder.lines("metrics"):
        assert line["left_out"] == {"1": "not finite"}
        assert line["clients"] == [0, 1, 2, 3, 4, 5] and 0 < line["loss"] < 10 and 0 < line["train_loss"] < 10
    assert "client 1 is left out of round 1: not finite" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [(), ("comm.collective=reduce",)], ids=["gather", "reduce"])
def test_updates_that_are_too_large_together_do_not_reach_the_model(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(monkeypatch, 3e38, everybody=True)
    with pytest.raises(RunError, match="the sum of all updates is not finite"):
        run(tmp_path / "run", *SIX, *overrides)
    assert RunFolder(tmp_path / "run").latest() is None
    run(tmp_path / "krum", *SIX, "server.aggregate=krum", "server.hostile=1", stop_after=1)


@pytest.mark.parametrize("rule", ROBUST)
def test_a_run_names_the_client_that_sends_garbage(
    rule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 1e4)
    folder = run(tmp_path / "run", *SIX, f"server.aggregate={rule}", "server.hostile=1")
    for line in folder.lines("metrics"):
        assert "1" in line["distrusted"] and line["left_out"] == {}
        assert line["loss"] < 2
    assert "round 2: client 1 is distrusted: its " in capsys.readouterr().err


def test_a_round_with_too_few_updates_for_its_aggregate_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, float("nan"))
    run(tmp_path / "run", *SHORT, "clients.count=3", "clients.per_round=3", "server.aggregate=trimmed_mean", "server.hostile=1")
    assert "round 1 has 2 updates, too few for trimmed_mean to bear 1 hostile ones: that takes 3" in capsys.readouterr().err


def test_when_all_are_left_out_the_run_ends_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoil(monkeypatch, float("nan"), everybody=True)
    with pytest.raises(RunError, match=r"no client has an update: not finite"):
        run(tmp_path / "run", *SIX)


@pytest.mark.parametrize(
    ("setting", "overrides"),
    [
        ("comm.collective", ("server.aggregate=median", "comm.collective=reduce")),
        ("server.hostile", ("server.aggregate=krum", "server.hostile=1", "clients.per_round=4")),
        ("server.hostile", ("server.aggregate=krum", "server.hostile=1", "clients.count=4")),
        ("clients.away", ("server.aggregate=krum", "server.hostile=1", "clients.per_round=5", "clients.away={0: [2, 3], 1: [3]}")),
        ("clients.away", ("clients.away={0: [1], 1: [1], 2: [1], 3: [1], 4: [1], 5: [8]}",)),
        ("clients.away", ("comm.sum=exact", "comm.secure=true", "clients.away={0: [1], 1: [1], 2: [1], 3: [1], 4: [5, 6]}")),
        ("server.hostile", ("server.aggregate=trimmed_mean", "server.hostile=2", "clients.per_round=4")),
        ("server.hostile", ("server.aggregate=trimmed_mean",)),
        ("server.hostile", ("server.aggregate=multi_krum",)),
        ("server.aggregate", ("server.aggregate=median", *TOP)),
        ("server.aggregate", ("server.aggregate=trimmed_mean", "server.hostile=1", *TOP)),
        ("comm.wire.feedback", ("method.lowrank.rule=svd", *TOP)),
        ("comm.wire.feedback", ("method.lowrank.rule=stack", *TOP)),
        ("comm.wire.feedback", ("method.lowrank.rule=fedsvd", *TOP)),
        ("server.aggregate", ("server.aggregate=median", "method.lowrank.rule=svd")),
        ("method.lowrank.rule", ("method.lowrank.rule=rolora", "server.momentum=0.5")),
        ("comm.collective", ("method.lowrank.rule=stack", "comm.collective=auto")),
    ],
)
def test_settings_that_do_not_go_together(setting: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(*overrides)
    assert caught.value.setting == setting
