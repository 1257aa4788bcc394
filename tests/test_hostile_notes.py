"""What other ranks tell rank 0 besides updates, damaged or meant to harm: notes of a round, factors, a joiner's account of itself."""

import json
import math
import pickle
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from slora_dist import handover
from slora_dist.admission import account, judge
from slora_dist.aggregate.factors import Pair
from slora_dist.errors import RunError
from slora_dist.journal import Journal, settle
from slora_dist.ledger import Label, Ledger, Timing
from slora_dist.svd import Factors
from tests.hostile import JSON_GARBAGE, Bomb, spoilt
from tests.tiny import tiny

Rng = random.Random


def notes() -> Any:
    """What a rank tells of a round in which it sent a message and timed a span."""
    journal = Journal(Ledger(1))
    journal.ledger.add(Label("sparse", 7, "up", {"value": 8}), "gather", 1, 8, Timing(1.0, 2.0, ready=[1.5]))
    journal.note("train", "sparse", 7, 1.0, 2.0, client=3)
    return json.loads(journal.take(7))


def told(text: bytes) -> None:
    """Let rank 0 settle a round of which rank 1 tells ``text``."""
    journal = Journal(Ledger(0))
    journal.ledger.add(Label("sparse", 7, "up", {"value": 8}), "gather", 0, 8, Timing(1.0, 2.0, arrived=[(2.0, 0.0)], senders=[1]))
    settle({0: journal.take(7), 1: text}, {0: 0.0, 1: 0.0})


def test_bad_notes_are_refused_with_one_clear_error() -> None:
    rng, refused = Rng(13), 0
    told(json.dumps(notes()).encode())
    for number in range(600):
        text = json.dumps(spoilt(notes(), rng, JSON_GARBAGE)).encode()
        try:
            told(text if number % 3 else text[: rng.randrange(len(text))])
        except RunError as error:
            refused += 1
            assert str(error).startswith("rank 1: its notes of the round ") and "\n" not in str(error)
    assert refused > 400
    fewer, more, other = notes(), notes(), notes()
    fewer["entries"], more["entries"][0]["timing"]["ready"], other["entries"][0]["op"] = [], [1.0, 2.0], "reduce"
    for wrong in (json.dumps(tree).encode() for tree in (fewer, more, other)):
        with pytest.raises(RunError, match="rank 1: its notes of the round tell of"):
            told(wrong)
    for text in (b"", b"\xff", b"[" * 100_000, b"9" * 5000):
        with pytest.raises(RunError, match="cannot be read"):
            told(text)


def spread_by(wire: bytes, monkeypatch: pytest.MonkeyPatch) -> dict[str, Factors]:
    """Let rank 0 take the factors of the one layer that rank 1 factored."""
    monkeypatch.setattr(handover, "gather_bytes", lambda *_: {0: save({}), 1: wire})
    pair = Pair("layer", slice(0, 6), slice(6, 14), rank=2, scale=1.0)
    comm: Any = SimpleNamespace(rank=0, members=[1, 0])
    return handover.spread(comm, ["layer"], lambda _: {}, {"layer": pair}, Label("lowrank", 3, "control", {"factors": 0}))


def test_bad_factors_are_refused_with_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"layer/b": torch.ones(4, 2), "layer/a": torch.ones(2, 3), "layer/energies": torch.ones(3, dtype=torch.float64)}
    assert spread_by(save(good), monkeypatch)["layer"].a_RI.shape == (2, 3)
    for wrong, problem in (
        ({"layer/b": torch.ones(2, 4)}, "other factors than those of its layers"),
        ({"layer/a": torch.ones(2, 3).half()}, "other factors than those of its layers"),
        ({"layer/energies": torch.ones(2, dtype=torch.float64)}, "other factors than those of its layers"),
        ({"another/b": torch.ones(4, 2)}, "other factors than those of its layers"),
        ({"layer/b": torch.full((4, 2), math.nan)}, "factors that are not finite"),
    ):
        with pytest.raises(RunError, match=f"rank 1 sent {problem}"):
            spread_by(save(good | wrong), monkeypatch)
    rng, whole = Rng(17), save(good)
    for number in range(300):
        bad = (whole[: rng.randrange(len(whole))], rng.randbytes(99), pickle.dumps(Bomb()), b"")[number % 4]
        with pytest.raises(RunError, match="rank 1 sent factors that cannot be read"):
            spread_by(bad, monkeypatch)


def test_a_bad_account_of_a_rank_that_joins_is_refused() -> None:
    rng, config = Rng(19), tiny()
    good = account(config)
    assert judge(config, 2, good) is None
    wrong = (
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"[" * 60_000,
        b'{"version": 1}',
        good[:99],
        pickle.dumps(Bomb()),
        good.replace(b"null", b"[1]"),
    )
    for text in (*wrong, *(rng.randbytes(50) for _ in range(50))):
        refusal = judge(config, 2, text)
        assert refusal and len(str(refusal).splitlines()) == 1 and "rank 2" in str(refusal)
