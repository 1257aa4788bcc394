from dataclasses import replace

from slora_dist.ledger import Entry, Label, Ledger, Timing, line, totals

DOWN = Label("sparse", 3, "down", {"value": 40, "head": 8})


def test_a_line_multiplies_by_the_clients_that_a_rank_plays() -> None:
    entry = Entry(DOWN, "broadcast", clients=3, transport_bytes=48, timing=Timing(5.0, 0.12345678))
    assert line(2, entry, began=1005.0, wait=0.02) == {
        "rank": 2, "round": 3, "phase": "sparse", "op": "broadcast", "direction": "down", "kind": "value+head", "payload_bytes": 144,
        "bytes_by_kind": {"value": 120, "head": 24}, "clients": 3, "transport_bytes": 48, "began": 1005.0, "seconds": 0.123457,
        "wait_seconds": 0.02,
    }  # fmt: skip


def test_entries_are_handed_over_once() -> None:
    ledger = Ledger(0)
    ledger.add(DOWN, "broadcast", 1, 0, Timing(0.0, 0.0))
    assert len(ledger.take()) == 1 and ledger.take() == []


def test_totals_sum_payload_and_keep_control_apart() -> None:
    noted = [
        (DOWN, "broadcast", 2),
        (replace(DOWN, direction="up"), "gather", 1),
        (replace(DOWN, phase="lowrank", direction="up", by_kind={"factor_a": 5}), "gather", 4),
        (Label("sparse", 3, "control", {"header": 64}), "gather", 2),
    ]
    lines = [line(0, Entry(label, op, clients, 0, Timing(0.0, 0.0)), 0.0, 0.0) for label, op, clients in noted]
    assert totals(lines) == {
        "up": 68,
        "down": 96,
        "control": 128,
        "by_phase": {"sparse": {"up": 48, "down": 96}, "lowrank": {"up": 20, "down": 0}},
        "by_kind": {"up": {"value": 40, "head": 8, "factor_a": 20}, "down": {"value": 80, "head": 16}},
    }


def test_no_lines_are_no_bytes() -> None:
    assert totals([]) == {"up": 0, "down": 0, "control": 0, "by_phase": {}, "by_kind": {"up": {}, "down": {}}}
