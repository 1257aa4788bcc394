"""Masks cancel in the sum over all, and only there; what rank 0 receives looks like noise."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from slora_dist.comm.alone import Alone
from slora_dist.comm.metered import Metered
from slora_dist.errors import RunError
from slora_dist.exactsum import exact
from slora_dist.fixed import Fixed
from slora_dist.ledger import Label, Ledger
from slora_dist.secure import KEY_BYTES, Masker, stream
from slora_dist.support import Slot, Support
from slora_dist.upload import Upload
from slora_dist.wire import HEADER_BYTES, Header

SUPPORTS = {
    "sparse": Support([Slot("a", (90, 70), "value", 700, mask_seed=1), Slot.whole("c", (31,), "head")]),
    "factors": Support([Slot.whole("a", (4, 80), "factor_a"), Slot.whole("b", (60, 4), "factor_b")]),
    "dense": Support([Slot.whole("a", (40, 50), "value")]),
}


class Tapped(Alone):
    """A world of one that keeps the bytes of every gather, as rank 0 sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[list[bytes]] = []

    def gather(self, messages: Any, senders: Sequence[int], nbytes: int | None) -> Iterator[Any]:
        kept = [message_B.clone() for message_B in messages]
        self.gathered.append([message_B.numpy().tobytes() for message_B in kept])
        return super().gather(kept, senders, nbytes)


def mean(clients: Sequence[int], support: Support, bits: Any, secure: bool, comm: Alone | None = None) -> Tensor:
    wire = Fixed(support, bits)
    headers = [Header(client, 0, 3, 1, 0.5, 0.1, wire.nbytes) for client in clients]
    job = Upload(wire, Label("sparse", 3, "up", wire.by_kind()), headers, [0] * len(clients), False)
    updates = ((header, torch.full((support.numel,), 0.001 * header.client)) for header in headers)
    received = exact(Metered(comm or Alone(), Ledger(0)), job, updates, "gather", secure)
    assert received
    return received.mean_N


@pytest.mark.parametrize("clients", [2, 5, 32])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kind", SUPPORTS)
def test_the_sum_is_the_plain_one(kind: str, bits: int, clients: int) -> None:
    plain_N, masked_N = (mean(range(clients), SUPPORTS[kind], bits, secure) for secure in (False, True))
    assert torch.equal(plain_N, masked_N) and plain_N.any()


@pytest.mark.parametrize("bits", [32, 64])
def test_what_rank_0_receives_is_uniform(bits: int) -> None:
    """Constant updates of three clients: each message passes a chi-square test on its bytes, where the plain ones are far off."""
    support = Support([Slot.whole("a", (400, 100), "value")])
    tapped, plain = Tapped(), Tapped()
    mean(range(3), support, bits, True, tapped)
    mean(range(3), support, bits, False, plain)
    for comm, uniform in ((tapped, True), (plain, False)):
        for message in comm.gathered[-1]:
            counts = np.bincount(np.frombuffer(message[HEADER_BYTES:], dtype=np.uint8), minlength=256)
            assert (chisquare(counts).pvalue > 1e-6) == uniform
    first, second, third = (np.frombuffer(message[HEADER_BYTES:], dtype=np.uint8) for message in tapped.gathered[-1])
    for one, other in ((first, second), (first, third), (second, third)):
        assert chisquare(np.bincount(one - other, minlength=256)).pvalue > 1e-6, "nor do two of them tell anything together"


def test_keys_are_new_in_every_round_and_public_ones_travel_alone() -> None:
    first, second = Tapped(), Tapped()
    for comm in (first, second):
        mean(range(4), SUPPORTS["dense"], 32, True, comm)
    keys = [{key for gathered in comm.gathered for key in gathered if len(key) == KEY_BYTES} for comm in (first, second)]
    assert len(keys[0]) == len(keys[1]) == 4 and not keys[0] & keys[1]


def test_without_one_client_the_sum_is_noise_and_new_keys_mend_it() -> None:
    """A client is gone after the keys were exchanged: what the others sent is of no use; among themselves they get their sum."""
    numel, clients = 40_000, (0, 1, 2, 3)
    integers = {client: torch.full((numel,), client + 1, dtype=torch.int32) for client in clients}

    def masked(there: Sequence[int], said: Sequence[int]) -> Tensor:
        maskers = {client: Masker(client, b"round") for client in said}
        public = {client: masker.public for client, masker in maskers.items()}
        return torch.stack([maskers[client].mask(integers[client], public) for client in there]).sum(0, dtype=torch.int32)

    assert masked(clients, clients).eq(10).all()
    counts = np.bincount(masked((0, 1, 3), clients).numpy().view(np.uint8), minlength=256)
    assert chisquare(counts).pvalue > 1e-6
    assert masked((0, 1, 3), (0, 1, 3)).eq(7).all()


def test_a_client_that_is_left_alone_sends_nothing() -> None:
    comm = Tapped()
    with pytest.raises(RunError, match="one client is left"):
        mean([4], SUPPORTS["dense"], 32, True, comm)
    assert not comm.gathered


def test_masks_differ_by_pair_and_round() -> None:
    one, other = Masker(1, b"sparse,1"), Masker(2, b"sparse,1")
    zeros_N = torch.zeros(100, dtype=torch.int64)
    public = {1: one.public, 2: other.public}
    assert torch.equal(one.mask(zeros_N, public), -other.mask(zeros_N, public))
    later = Masker(2, b"sparse,2")
    assert not torch.equal(one.mask(zeros_N, public), one.mask(zeros_N, {1: one.public, 2: later.public}))


def test_keys_that_are_none_are_refused() -> None:
    masker, zeros_N = Masker(1, b"round"), torch.zeros(4, dtype=torch.int32)
    for public in ({2: bytes(32)}, {1: bytes(32), 2: stream(bytes(32), 32)}, {1: masker.public, 2: masker.public}):
        with pytest.raises(RunError, match="client 1: the keys of the round are not those that its clients sent"):
            masker.mask(zeros_N, {client: bytes(key) for client, key in public.items()})
    for wrong in (bytes(32), b"short"):  # a point of small order gives everybody the same secret
        with pytest.raises(RunError, match="client 1: what came as the key of client 2 is none"):
            masker.mask(zeros_N, {1: masker.public, 2: wrong})


def test_the_stream_is_chacha20s() -> None:
    """The first block of RFC 8439's test vector 1 (appendix A.1): key, nonce and counter zero."""
    assert stream(bytes(32), 16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"
