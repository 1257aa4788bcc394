import json
from dataclasses import replace

from slora_dist.ledger import Label, Ledger, totals

DOWN = Label("sparse", 3, "down", {"value": 40, "head": 8})


def test_a_line_multiplies_by_the_clients_that_a_rank_plays() -> None:
    ledger = Ledger(rank=2)
    ledger.add(DOWN, "broadcast", clients=3, transport_bytes=48, seconds=0.12345678)
    (line,) = [json.loads(text) for text in ledger.take().splitlines()]
    assert line == {
        "rank": 2, "round": 3, "phase": "sparse", "op": "broadcast", "direction": "down", "kind": "value+head", "payload_bytes": 144,
        "bytes_by_kind": {"value": 120, "head": 24}, "clients": 3, "transport_bytes": 48, "seconds": 0.123457,
    }  # fmt: skip


def test_lines_are_handed_over_once() -> None:
    ledger = Ledger(0)
    ledger.add(DOWN, "broadcast", 1, 0, 0.0)
    assert ledger.take().count("\n") == 1 and ledger.take() == ""


def test_totals_sum_payload_and_keep_control_apart() -> None:
    ledger = Ledger(0)
    ledger.add(DOWN, "broadcast", 2, 48, 0.0)
    ledger.add(replace(DOWN, direction="up"), "gather", 1, 48, 0.0)
    ledger.add(replace(DOWN, phase="lowrank", direction="up", by_kind={"factor_a": 5}), "gather", 4, 0, 0.0)
    ledger.add(Label("sparse", 3, "control", {"header": 64}), "gather", 2, 0, 0.0)
    assert totals(json.loads(line) for line in ledger.take().splitlines()) == {
        "up": 68,
        "down": 96,
        "control": 128,
        "by_phase": {"sparse": {"up": 48, "down": 96}, "lowrank": {"up": 20, "down": 0}},
        "by_kind": {"up": {"value": 40, "head": 8, "factor_a": 20}, "down": {"value": 80, "head": 16}},
    }


def test_no_lines_are_no_bytes() -> None:
    assert totals([]) == {"up": 0, "down": 0, "control": 0, "by_phase": {}, "by_kind": {"up": {}, "down": {}}}
