"""Waiting is told from moving by when the others were ready, on one clock."""

import json

import pytest

from slora_dist.journal import Journal, settle
from slora_dist.ledger import Label, Ledger, Row, Timing

DOWN = Label("sparse", 1, "down", {"value": 8})
UP = Label("sparse", 1, "up", {"value": 8})
SHIFTS = {0: 1000.0, 1: 1500.0, 2: 1000.0}  # rank 1 runs on a machine whose clock started 500 s later


def settled(timings: dict[int, Timing], op: str) -> dict[int, Row]:
    notes = {}
    for rank, timing in timings.items():
        journal = Journal(Ledger(rank))
        journal.ledger.add(DOWN if op == "broadcast" else UP, op, 1, 8, timing)
        notes[rank] = journal.take(1)
    return {line["rank"]: line for line in settle(notes, SHIFTS)["ledger"]}


def test_a_broadcast_waits_for_rank_0_and_rank_0_for_the_last() -> None:
    lines = settled({0: Timing(10.0, 3.0), 1: Timing(-492.0, 5.0), 2: Timing(11.0, 1.5)}, "broadcast")
    assert [line["began"] for line in lines.values()] == [1010.0, 1008.0, 1011.0]
    assert [line["wait_seconds"] for line in lines.values()] == [1.0, 2.0, 0.0]


def test_a_reduce_waits_for_the_last() -> None:
    lines = settled({0: Timing(10.0, 3.0), 1: Timing(-490.0, 3.0), 2: Timing(12.0, 1.0)}, "reduce")
    assert [line["wait_seconds"] for line in lines.values()] == [2.0, 2.0, 0.0]


def test_a_gather_moves_a_message_once_it_is_ready_and_the_one_before_has_arrived() -> None:
    """Rank 1 is ready at 12 and its message arrives at 14; rank 2's, ready since 11, then takes until 15; adding took half a second."""
    root = Timing(10.0, 4.5, ready=(), arrived=[(14.0, 0.0), (15.0, 0.5)], senders=(1, 2))
    lines = settled({0: root, 1: Timing(-490.0, 2.0, ready=(-488.0,)), 2: Timing(10.0, 4.0, ready=(11.0,))}, "gather")
    assert [line["seconds"] - line["wait_seconds"] for line in lines.values()] == [2.5, 2.0, 0.5]


def test_a_world_of_one_never_waits() -> None:
    assert settled({0: Timing(10.0, 3.0, ready=(11.0,), arrived=[(12.0, 1.0)], senders=(0,))}, "gather")[0]["wait_seconds"] == 0


def test_moving_is_never_more_than_the_time_inside() -> None:
    """Clocks of two machines agree to some error only: no figure may leave what was measured on one of them."""
    root = Timing(10.0, 0.5, arrived=[(14.0, 0.0)], senders=(1,))
    lines = settled({0: root, 1: Timing(-490.0, 0.1, ready=(-490.0,))}, "gather")
    assert [line["wait_seconds"] for line in lines.values()] == [0.0, 0.0]


def test_spans_are_put_on_the_clock_of_rank_0() -> None:
    journal = Journal(Ledger(1))
    journal.note("train", "sparse", 1, -490.0, 2.0, client=7)
    (span,) = settle({1: journal.take(1)}, SHIFTS)["timeline"]
    assert span == {"rank": 1, "round": 1, "phase": "sparse", "what": "train", "client": 7, "began": 1010.0, "seconds": 2.0}
    assert settle({1: journal.take(2)}, SHIFTS)["timeline"] == []


def test_notes_that_rank_0_did_not_get_are_told_again_as_broken() -> None:
    journal = Journal(Ledger(1))
    journal.ledger.add(UP, "gather", 1, 8, Timing(1.0, 2.0, ready=(1.5,)))
    journal.note("train", "sparse", 1, 1.0, 2.0)
    lost = settle({1: journal.take(1)}, SHIFTS)
    journal.recall(0)
    again = settle({1: journal.take(1)}, SHIFTS)
    assert again["timeline"] == lost["timeline"]
    assert [(line["kind"], line["payload_bytes"], line["transport_bytes"]) for line in again["ledger"]] == [("broken", 8, 8)]
    journal.recall(1)
    assert settle({1: journal.take(2)}, SHIFTS)["ledger"] == [], "rank 0 had finished the round"


def test_interfaces_are_told_once_a_host() -> None:
    notes = {rank: Journal(Ledger(rank)).take(1) for rank in (0, 1, 2)}
    elsewhere = json.loads(notes[2]) | {"place": "another host"}
    rows = settle({**notes, 2: json.dumps(elsewhere).encode()}, SHIFTS)["counters"]
    assert [bool(row["interfaces"]) for row in rows] == [True, False, True]
    assert all(set(row["tcp"]) == {"sent_bytes", "received_bytes", "segments_out", "segments_in"} for row in rows)


def test_a_span_of_a_block_that_fails_is_not_noted() -> None:
    journal = Journal(Ledger(0))
    with pytest.raises(ZeroDivisionError), journal.span("train", "sparse", 1):
        _ = 1 / 0
    assert settle({0: journal.take(1)}, SHIFTS)["timeline"] == []
