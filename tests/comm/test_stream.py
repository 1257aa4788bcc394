"""The gather of every transport, over links within this process: order, look-ahead, memory, and what a peer may not announce."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slora_dist.comm import stream
from slora_dist.errors import RunError

BUCKET = 64


@dataclass(frozen=True)
class Done:
    wait: Callable[[], None]


@dataclass
class Paper:
    """A link on which sends are queued by rank, and a receive takes the first of its peer's queue when it is waited for."""

    rank: int
    sent: dict[int, deque[Tensor]]
    events: list[str] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    bucket: int = BUCKET
    max_message: int = 1000

    def send(self, chunk_b: Tensor, turns: int) -> stream.Transfer:
        self.turns.append(turns)
        self.events.append(f"send {chunk_b.numel()}")
        self.sent.setdefault(self.rank, deque()).append(chunk_b.clone())
        return Done(lambda: self.events.append(f"sent {chunk_b.numel()}"))

    def receive(self, chunk_b: Tensor, peer: int) -> stream.Transfer:
        self.events.append(f"post {chunk_b.numel()}")
        return Done(lambda: self._arrive(chunk_b, peer))

    def _arrive(self, chunk_b: Tensor, peer: int) -> None:
        self.events.append(f"wait {chunk_b.numel()}")
        chunk_b.copy_(self.sent[peer].popleft())


def content(index: int, nbytes: int) -> Tensor:
    return ((torch.arange(nbytes) * 7 + index) % 253).to(torch.uint8)


def gathered(sizes: Sequence[int], senders: Sequence[int], nbytes: int | None, root: Paper) -> list[Tensor]:
    """Play every sender, then rank 0, and put the messages together from their chunks."""

    def own(rank: int) -> Iterator[Tensor]:
        return (content(index, size) for index, (size, sender) in enumerate(zip(sizes, senders, strict=True)) if sender == rank)

    for rank in sorted(set(senders) - {0}):
        assert list(stream.gather(Paper(rank, root.sent), own(rank), senders, nbytes)) == []
    whole = [torch.empty(0, dtype=torch.uint8) for _ in sizes]
    for index, offset, chunk_b in stream.gather(root, own(0), senders, nbytes):
        assert offset == whole[index].numel() and all(not later.numel() for later in whole[index + 1 :])
        assert chunk_b.numel() <= BUCKET
        whole[index] = torch.cat([whole[index], chunk_b])
    return whole


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5 * BUCKET)), max_size=12))
def test_any_plan_arrives_whole_and_in_order(plan: list[tuple[int, int]]) -> None:
    senders, sizes = [sender for sender, _ in plan], [size for _, size in plan]
    root = Paper(0, {})
    for index, whole in enumerate(gathered(sizes, senders, None, root)):
        assert torch.equal(whole, content(index, sizes[index]))
    assert not any(root.sent.values()), "something was sent that rank 0 did not receive"


@given(st.lists(st.integers(0, 3), max_size=8), st.integers(0, 3 * BUCKET))
def test_any_plan_of_one_size(senders: list[int], nbytes: int) -> None:
    root = Paper(0, {})
    for index, whole in enumerate(gathered([nbytes] * len(senders), senders, nbytes, root)):
        assert torch.equal(whole, content(index, nbytes))
    assert not any(root.sent.values()), "something was sent that rank 0 did not receive"


def test_the_next_chunk_is_posted_before_one_is_used() -> None:
    root = Paper(0, {1: deque(torch.split(content(0, 3 * BUCKET - 1), BUCKET))})
    for _, _, chunk_b in stream.gather(root, iter(()), [1], 3 * BUCKET - 1):
        root.events.append(f"use {chunk_b.numel()}")
    assert root.events == ["post 64", "post 64", "wait 64", "use 64", "post 63", "wait 64", "use 64", "wait 63", "use 63"]


def test_memory_is_two_buckets() -> None:
    root = Paper(0, {1: deque(torch.split(content(0, 9 * BUCKET), BUCKET))})
    places = [chunk_b.data_ptr() for _, _, chunk_b in stream.gather(root, iter(()), [1], 9 * BUCKET)]
    assert len(set(places)) == 2 and places[0] != places[1]


def test_a_message_is_sent_before_the_next_is_made() -> None:
    link = Paper(2, {})

    def made() -> Iterator[Tensor]:
        for index in (1, 3):
            link.events.append(f"make {index}")
            yield content(index, 10)

    assert list(stream.gather(link, made(), [1, 2, 0, 2], None)) == []
    assert link.events == ["make 1", "send 8", "send 10", "make 3", "send 8", "send 10", "sent 8", "sent 10", "sent 8", "sent 10"]
    assert link.turns == [2, 2, 4, 4], "a send may have to wait for all messages that come before it"


@pytest.mark.parametrize("size", [-1, 1001, 1 << 62, -(1 << 63)])
def test_an_announced_size_must_be_possible(size: int) -> None:
    root = Paper(0, {1: deque([torch.tensor([size]).view(torch.uint8)])})
    with pytest.raises(RunError, match=f"^rank 0: gather with rank 1 failed: message 0 announces {size} bytes, allowed are 0 to 1000$"):
        list(stream.gather(root, iter(()), [1], None))


def test_the_largest_announced_size_is_allowed() -> None:
    assert gathered([1000], [1], None, Paper(0, {}))[0].numel() == 1000


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_messages_as_the_plan_says(count: int) -> None:
    for rank in (0, 1):
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            list(stream.gather(Paper(rank, {}), iter([content(0, 10)] * count), [rank], 10))


def test_a_message_has_the_promised_size() -> None:
    for rank in (0, 1):
        with pytest.raises(AssertionError, match="9 bytes, 10 were promised"):
            list(stream.gather(Paper(rank, {}), iter([content(0, 9)]), [rank], 10))
