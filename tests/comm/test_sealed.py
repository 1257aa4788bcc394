"""Sealed messages: whatever is changed on the way does not open, and no key and nonce come twice."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slora_dist.comm.alone import Alone
from slora_dist.comm.base import Chunk
from slora_dist.comm.sealed import OVERHEAD, Sealed, carried
from slora_dist.errors import ConfigError, RunError
from tests.tiny import tiny

PAYLOAD = 128
SESSION = b"s" * 32


def content(nbytes: int, index: int = 0) -> Tensor:
    return ((torch.arange(nbytes) * 13 + index) % 251).to(torch.uint8)


class Wiretap(Alone):
    """Rank 1's messages reach rank 0 as ``change`` leaves them; both are played one after the other in this process."""

    def __init__(self, rank: int, air: list[Tensor], change: Callable[[list[Tensor]], list[Tensor]] = lambda messages: messages) -> None:
        super().__init__(PAYLOAD + OVERHEAD)
        self.rank, self.size, self.air, self.change = rank, 2, air, change

    def broadcast(self, wire_B: Tensor) -> None:
        if self.rank == 0:
            self.air.append(wire_B.clone())
        else:
            wire_B.copy_(self.change(self.air)[-1])

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        if self.rank:
            self.air.extend(message_B.clone() for message_B in messages)
            return
        for index, message_B in enumerate(self.change(self.air)):
            for offset in range(0, max(message_B.numel(), 1), self.bucket):
                yield index, offset, message_B[offset : offset + self.bucket]


def uploaded(sizes: Sequence[int], nbytes: int | None, change: Callable[[list[Tensor]], list[Tensor]], operations: int = 1) -> list[Tensor]:
    """Gather messages of rank 1 on rank 0, the last time as ``change`` leaves them, and return them."""
    air: list[Tensor] = []
    sender, root = Sealed(Wiretap(1, air), SESSION), Sealed(Wiretap(0, air), SESSION)
    for operation in range(operations):
        assert isinstance(root.comm, Wiretap)
        root.comm.change = change if operation + 1 == operations else lambda messages: messages[-len(sizes) :]
        list(sender.gather([content(size, index) for index, size in enumerate(sizes)], [1] * len(sizes), nbytes))
        whole = [torch.empty(0, dtype=torch.uint8) for _ in sizes]
        for index, offset, chunk_b in root.gather([], [1] * len(sizes), nbytes):
            assert offset == whole[index].numel() and chunk_b.numel() <= PAYLOAD
            whole[index] = torch.cat([whole[index], chunk_b])
    return whole


@given(st.lists(st.integers(0, 4 * PAYLOAD), min_size=1, max_size=5))
def test_what_is_sealed_opens_to_the_same(sizes: list[int]) -> None:
    seen: list[Tensor] = []
    whole = uploaded(sizes, None, lambda messages: seen.extend(messages) or messages)
    assert all(torch.equal(message, content(size, index)) for index, (message, size) in enumerate(zip(whole, sizes, strict=True)))
    assert [message.numel() for message in seen] == [carried(size, PAYLOAD) for size in sizes]


def flipped(at: int) -> Callable[[list[Tensor]], list[Tensor]]:
    def change(messages: list[Tensor]) -> list[Tensor]:
        messages[0][at] ^= 1
        return messages

    return change


FRAME = PAYLOAD + OVERHEAD


def put(message: Tensor, *frames: int) -> Tensor:
    return torch.cat([message[at * FRAME :][:FRAME] for at in frames])


CHANGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    **{f"byte {at} altered": flipped(at) for at in (0, 4, 8, 16, 24, 40, 47, 48, FRAME - 1, FRAME, -1)},
    "messages swapped": lambda messages: messages[::-1],
    "one message twice": lambda messages: [messages[0], messages[0]],
    "frames swapped": lambda messages: [put(messages[0], 1, 0, 2), messages[1]],
    "a frame twice": lambda messages: [put(messages[0], 0, 0, 2), messages[1]],
    "cut after a frame": lambda messages: [messages[0][:FRAME], messages[1]],
    "the last one cut after a frame": lambda messages: [messages[0], messages[1][:FRAME]],
    "cut within a frame": lambda messages: [messages[0][: FRAME + 70], messages[1]],
    "cut within a head": lambda messages: [messages[0][: FRAME + 9], messages[1]],
    "empty": lambda messages: [messages[0][:0], messages[1]],
    "a frame more": lambda messages: [put(messages[0], 0, 1, 2, 0), messages[1]],
}


@pytest.mark.parametrize("nbytes", [3 * PAYLOAD, None])
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_refused_with_its_sender_named(name: str, nbytes: int | None) -> None:
    with pytest.raises(RunError, match="rank 0: gather with rank 1 failed: "):
        uploaded([3 * PAYLOAD, 3 * PAYLOAD], nbytes, CHANGES[name])


def test_a_frame_that_does_not_verify_is_named() -> None:
    with pytest.raises(RunError, match=r"^rank 0: gather with rank 1 failed: frame 1 of message 0 of operation 1 does not verify$"):
        uploaded([3 * PAYLOAD] * 2, None, flipped(FRAME + 60))


def test_an_earlier_operation_is_not_taken_for_this_one() -> None:
    assert uploaded([200], 200, lambda messages: messages[1:], operations=2)
    with pytest.raises(RunError, match="operation 2 does not verify"):
        uploaded([200], 200, lambda messages: messages[:1], operations=2)


def test_a_message_of_another_size_than_promised_is_refused() -> None:
    air: list[Tensor] = []
    list(Sealed(Wiretap(1, air), SESSION).gather([content(100)], [1], None))
    with pytest.raises(RunError, match="message 0 has 100 bytes in place of 90"):
        list(Sealed(Wiretap(0, air), SESSION).gather([], [1], 90))


@pytest.mark.parametrize("nbytes", [0, 1, PAYLOAD, 3 * PAYLOAD + 5])
def test_a_broadcast_opens_to_the_same_and_not_when_altered(nbytes: int) -> None:
    air: list[Tensor] = []
    Sealed(Wiretap(0, air), SESSION).broadcast(content(nbytes))
    wire_B = torch.zeros(nbytes, dtype=torch.uint8)
    Sealed(Wiretap(1, air), SESSION).broadcast(wire_B)
    assert torch.equal(wire_B, content(nbytes)) and (nbytes < 9 or bytes(content(nbytes)[:9].numpy()) not in bytes(air[0].numpy()))
    for at in (8, 50, -1):
        with pytest.raises(RunError, match=r"rank 1: broadcast with rank 0 failed: frame \d of message 0 of operation 1 does not"):
            Sealed(Wiretap(1, [air[0].clone()], flipped(at)), SESSION).broadcast(wire_B)
    with pytest.raises(RunError, match="does not verify"):
        Sealed(Wiretap(1, air), b"t" * 32).broadcast(wire_B)


def test_a_frame_of_another_rank_generation_or_direction_does_not_open() -> None:
    air: list[Tensor] = []
    Sealed(Wiretap(0, air), SESSION).broadcast(content(50))
    with pytest.raises(RunError, match="another kind or sender"):
        list(Sealed(Wiretap(0, air), SESSION).gather([], [1], 50))
    later = Sealed(Wiretap(1, air), SESSION)
    later.restart(1)
    with pytest.raises(RunError, match="does not verify"):
        later.broadcast(torch.zeros(50, dtype=torch.uint8))


def test_no_key_and_nonce_come_twice() -> None:
    """Neither in one life, nor in another with the same session, as a rank has that comes back."""
    heads: list[bytes] = []
    for _ in range(2):
        air: list[Tensor] = []
        sender = Sealed(Wiretap(1, air), SESSION)
        for generation in range(2):
            sender.restart(generation)
            list(sender.gather([content(3 * PAYLOAD)], [1], None))
        heads += [bytes(message[at : at + 40].numpy()) for message in air for at in range(0, message.numel(), FRAME)]
    assert len(set(heads)) == len(heads) == 12


@pytest.mark.parametrize("collective", ["reduce", "auto"])
def test_sums_on_the_way_cannot_be_sealed(collective: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny("comm.encrypt=true", f"comm.collective={collective}")
    assert error.value.setting == "comm.encrypt" and "gather" in error.value.allowed
    with pytest.raises(ValueError, match="cannot be sealed"):
        Sealed(Alone(), SESSION).reduce(torch.zeros(3))
