"""Links of clients: who has which, what a round takes, and that real messages are delayed by as much."""

import json
from collections import Counter
from math import inf
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from slora_dist.comm.alone import Alone
from slora_dist.comm.shaped import Shaped
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.links import Collective, Direct, Link, Routing, seconds
from slora_dist.network import Network, links
from slora_dist.roundplan import RoundPlan
from tests.ranks import run_ranks
from tests.tiny import SHORT, run, same, tiny

CLASSES = "network.classes={phone: {share: 3, up_mbit: 5, down_mbit: 20, latency_ms: 40}, campus: {up_mbit: 1000}}"
PLAN = RoundPlan((0, 3, 5), (1, 2, 3))


def test_classes_have_their_shares_and_the_same_seed_the_same_links() -> None:
    config = tiny("clients.count=100", "network.mode=virtual", CLASSES)
    dealt = links(config)
    assert Counter(link.up_mbit for link in dealt) == {5.0: 75, 1000.0: 25}
    assert dealt == links(config) and dealt != links(tiny("clients.count=100", "network.mode=virtual", CLASSES, "run.seed=1"))
    assert {link.latency for link in dealt} == {0.04, 0.0}


def test_jitter_is_drawn_for_every_message_and_never_negative() -> None:
    network = Network(tiny("network.mode=virtual", "network.latency_ms=10", "network.jitter_ms=30"), None)
    seconds = {network.seconds(PLAN, number, (0, 0), [0.0] * 3, 0.0)["seconds"] for number in range(50)}  # type: ignore[index]
    assert len(seconds) > 40 and min(seconds) >= 0


def test_off_says_nothing() -> None:
    assert Network(tiny(), None).seconds(PLAN, 1, (8, 8), [1.0] * 3, 0.0) is None


def test_the_parts_of_the_last_client_make_the_round() -> None:
    network = Network(tiny("network.mode=virtual", "network.up_mbit=1", "network.down_mbit=4"), None)
    record = network.seconds(PLAN, 1, (10**6, 10**6), [1.0, 7.0, 2.0], 0.5)
    assert record and record["train"] == 7.0
    assert sum(record[part] for part in ("download", "train", "upload", "server")) == pytest.approx(record["seconds"])


def test_a_run_on_virtual_links_is_the_same_run(tmp_path: Path) -> None:
    plain, emulated = run(tmp_path / "plain", *SHORT), run(tmp_path / "emulated", *SHORT, "network.mode=virtual", CLASSES)
    for line in (lines := emulated.lines("metrics")):
        assert line["network"]["seconds"] > line["network"]["upload"] > 0
        line["network"] = None
    (emulated.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert same(plain, emulated)


def test_a_world_of_one_is_not_delayed() -> None:
    """Nothing leaves the process, so that no link is in its way."""
    comm = Shaped(Alone(), Direct(inf))
    comm.broadcast(torch.zeros(8, dtype=torch.uint8))
    assert [index for index, _, _ in comm.gather([torch.zeros(100, dtype=torch.uint8)], [0], 100)] == [0]


SIZE = 200_000
LINKS = {1: Link(8.0, 4.0, 0.25), 2: Link(4.0, 8.0, 0.5)}


def _delayed(rank: int, size: int, folder: Path, routing: Routing) -> tuple[list[float], bytes]:
    """Note how long the emulation slept in each verb: the time that passes besides is not its own."""
    from slora_dist.comm import shaped

    slept: list[float] = []

    class Time:
        perf_counter = staticmethod(lambda: 0.0)  # a clock that stands: every sleep is as long as if nothing else took time
        sleep = staticmethod(slept.append)

    shaped.time = Time  # type: ignore[assignment]
    comm = Shaped(TorchComm("gloo", rank, size, FileStore(str(folder / "store"), size), 40.0, bucket=64_000), routing)
    comm.links = LINKS
    wire_B = torch.full((SIZE,), rank, dtype=torch.uint8)
    comm.broadcast(wire_B)
    wire_B += rank
    got = b"".join(chunk_b.numpy().tobytes() for _, _, chunk_b in comm.gather([wire_B] if rank else [], [1, 2], SIZE))
    comm.close()
    return slept, got


@pytest.mark.parametrize("routing", [Direct(inf), Collective(inf, 10**6)], ids=["direct", "collective"])
def test_real_messages_take_what_their_links_take(tmp_path: Path, routing: Routing) -> None:
    """The delays are those of the arithmetic: each rank's part of the broadcast, then rank 0's messages since it."""
    (root, first, second) = run_ranks(3, _delayed, tmp_path, routing)
    assert root[1] == bytes([1]) * SIZE + bytes([2]) * SIZE
    one = {rate: seconds(SIZE, rate) for rate in (4.0, 8.0)}
    if isinstance(routing, Direct):
        had = [one[4.0] + 0.25, one[8.0] + 0.5]
        due = [had[0] + one[8.0] + 0.25, had[1] + one[4.0] + 0.5]
    else:
        had = [one[4.0] + 0.25, 2 * one[4.0] + 0.5]
        due = [had[0] + 0.25 + one[8.0], had[1] + 0.5 + one[4.0]]
    assert first[0] == pytest.approx(had[:1]) and second[0] == pytest.approx(had[1:])
    assert root[0] == pytest.approx([0.0, *due])
