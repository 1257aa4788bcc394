"""What the ledger says of a collective: payload by client, transport by rank, and only the transport's own time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from slora_dist.comm import metered
from slora_dist.comm.alone import Alone
from slora_dist.comm.metered import Metered
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.errors import TransportError
from slora_dist.ledger import Label, Ledger
from slora_dist.ledger import line as ledger_line
from slora_dist.wire import HEADER_BYTES
from tests.ranks import run_ranks

DOWN = Label("sparse", 3, "down", {"values": 60, "head": 40})
UP = Label("sparse", 3, "up", {"values": 60, "head": 40})
SENDERS = [1, 2, 1, 0]


def _lines(comm: Metered) -> list[dict[str, Any]]:
    return [ledger_line(comm.rank, entry, 0.0, 0.0) for entry in comm.ledger.take()]


def _play(comm: Metered) -> list[dict[str, Any]]:
    """A round of four clients on the ranks that SENDERS says, with a header in every message; then a sum."""
    played = SENDERS.count(comm.rank) if comm.size > 1 else len(SENDERS)
    senders = SENDERS if comm.size > 1 else [0] * len(SENDERS)
    comm.broadcast(torch.zeros(100, dtype=torch.uint8), DOWN, played)
    own = [torch.zeros(100 + HEADER_BYTES, dtype=torch.uint8)] * played
    for _ in comm.gather(own, senders, UP, 100 + HEADER_BYTES, header=True):
        pass
    comm.reduce(torch.zeros(25), UP, played)
    return _lines(comm)


def _rank(rank: int, size: int, folder: Path) -> list[dict[str, Any]]:
    comm = Metered(TorchComm("gloo", rank, size, FileStore(str(folder / "store"), size), 40.0), Ledger(rank))
    lines = _play(comm)
    comm.comm.close()
    return lines


def test_payload_is_the_same_in_every_world(tmp_path: Path) -> None:
    alone = _play(Metered(Alone(), Ledger(0)))
    ranks = run_ranks(3, _rank, tmp_path)
    for at, line in enumerate(alone):
        same = [lines[at] for lines in ranks]
        assert {(other["op"], other["direction"], other["kind"]) for other in same} == {(line["op"], line["direction"], line["kind"])}
        assert sum(other["payload_bytes"] for other in same) == line["payload_bytes"]
        assert sum(other["clients"] for other in same) == line["clients"] == len(SENDERS)
    assert [line["payload_bytes"] for line in alone] == [400, 400, 4 * HEADER_BYTES, 400]
    assert alone[0]["bytes_by_kind"] == {"values": 240, "head": 160}


class Broken(Alone):
    """A world whose gathers break when ``after`` messages have gone, or have come, and everything else at once."""

    def __init__(self, rank: int, after: int) -> None:
        super().__init__()
        self.rank, self.size, self.after = rank, 3, after

    def gather(self, messages: Any, senders: Any, nbytes: Any) -> Iterator[Any]:
        for at in range(self.after):
            if self.rank == 0:
                yield at, 0, torch.zeros(nbytes, dtype=torch.uint8)
            else:
                next(messages)
        raise TransportError("gather failed")

    def broadcast(self, wire_B: Tensor) -> None:
        raise TransportError("broadcast failed")

    def reduce(self, values: Tensor) -> None:
        raise TransportError("reduce failed")


def test_what_travelled_before_a_gather_broke_is_noted() -> None:
    for rank, senders, moved in ((0, [1, 2, 1], 200), (1, [1, 1, 1], 200)):
        ledger = Ledger(rank)
        with pytest.raises(TransportError):
            list(Metered(Broken(rank, 2), ledger).gather(iter([torch.zeros(100, dtype=torch.uint8)] * 3), senders, UP, 100))
        assert not ledger.entries
        (line,) = [ledger_line(rank, entry, 0.0, 0.0) for entry in ledger.broken]
        assert (line["kind"], line["op"], line["transport_bytes"]) == ("broken", "gather", moved)
        assert line["payload_bytes"] == (0 if rank == 0 else 200) == sum(line["bytes_by_kind"].values())


@pytest.mark.parametrize(("op", "giver"), [("broadcast", 0), ("reduce", 1)])
def test_what_was_handed_over_before_a_broadcast_or_a_sum_broke_is_noted(op: str, giver: int) -> None:
    """By the rank that gives; what the others were given by then nobody knows."""
    for rank in (0, 1):
        ledger = Ledger(rank)
        comm = Metered(Broken(rank, 0), ledger, carried=lambda nbytes: nbytes + 64 * (op == "broadcast"))
        with pytest.raises(TransportError):
            getattr(comm, op)(torch.zeros(100, dtype=torch.uint8), UP, 2 * rank)
        assert not ledger.entries
        lines = [ledger_line(rank, entry, 0.0, 0.0) for entry in ledger.broken]
        found = [(line["kind"], line["op"], line["payload_bytes"], line["transport_bytes"]) for line in lines]
        assert found == ([("broken", op, 200 * rank, 100 + 64 * (op == "broadcast"))] if rank == giver else [])


def test_transport_is_what_a_rank_handed_over_or_took(tmp_path: Path) -> None:
    message = 100 + HEADER_BYTES
    assert [line["transport_bytes"] for line in _play(Metered(Alone(), Ledger(0)))] == [0, 0, 0, 0]
    moved = [[line["transport_bytes"] for line in lines] for lines in run_ranks(3, _rank, tmp_path)]
    assert moved == [[100, 3 * message, 0, 100], [100, 2 * message, 0, 100], [100, message, 0, 100]]


def test_a_message_of_unknown_size_is_counted_as_it_was() -> None:
    comm = Metered(Alone(), Ledger(0))
    for _ in comm.gather([torch.zeros(77, dtype=torch.uint8)], [0], Label("start", 0, "control", {"about": 0}), None):
        pass
    assert [(line["payload_bytes"], line["bytes_by_kind"]) for line in _lines(comm)] == [(77, {"about": 77})]


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(Alone):
    """A transport that takes a second before it asks for a message, and another one after."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def gather(self, messages: Any, senders: Any, nbytes: int | None) -> Iterator[tuple[int, int, Tensor]]:
        own = iter(messages)
        for index in range(len(senders)):
            self.clock.now += 1.0
            message_b = next(own)
            self.clock.now += 1.0
            yield index, 0, message_b


def test_time_of_making_and_using_messages_is_not_counted(monkeypatch: Any) -> None:
    clock = Clock()
    monkeypatch.setattr(metered, "time", clock)

    def made() -> Iterator[Tensor]:
        for _ in range(3):
            clock.now += 100.0
            yield torch.zeros(100, dtype=torch.uint8)

    comm = Metered(Slow(clock), Ledger(0))
    for _ in comm.gather(made(), [0, 0, 0], UP, 100):
        clock.now += 10_000.0
    assert comm.seconds == 6.0
    assert [line["seconds"] for line in _lines(comm)] == [6.0]
