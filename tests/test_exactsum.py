"""Exact sums: the same bits by gather, by reduce and in a world of one, masked or not, for any clients and weights."""

import hashlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from slora_dist import fixed
from slora_dist.comm.alone import Alone
from slora_dist.comm.base import Communicator
from slora_dist.comm.metered import Metered
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.config import SumBits
from slora_dist.data.federation import class_names
from slora_dist.errors import ConfigError, RunError
from slora_dist.exactsum import exact
from slora_dist.fixed import Fixed
from slora_dist.ledger import Label, Ledger
from slora_dist.model import shell
from slora_dist.plan import plan
from slora_dist.support import Slot, Support
from slora_dist.upload import Received, Upload
from slora_dist.wire import Header
from tests.ranks import run_ranks
from tests.tiny import SHORT, run, same, tiny

CLIENTS, EXAMPLES = (2, 3, 5, 8, 9), (7, 1, 12, 5, 40)
SUPPORT = Support([Slot("a", (90, 70), "value", 700, mask_seed=1), Slot.whole("b", (4, 30), "factor_a"), Slot.whole("c", (31,), "head")])
CASES = list(product(("gather", "reduce"), (32, 64), (False, True), (False, True)))  # collective, bits, secure, by examples


def update(client: int) -> Tensor:
    """Coordinates of very different sizes, and clients too: float sums of them depend on the order."""
    generator = torch.Generator().manual_seed(client)
    return torch.randn(SUPPORT.numel, generator=generator) * 10.0 ** torch.randint(-6, 3, (SUPPORT.numel,), generator=generator)


def upload(bits: SumBits, by_examples: bool, size: int) -> Upload:
    wire = Fixed(SUPPORT, bits)
    ranks = [1 + at % (size - 1) if size > 1 else 0 for at in range(len(CLIENTS))]
    expected = [Header(client, 0, 1, 0, 0.0, 0.0, wire.nbytes) for client in CLIENTS]
    return Upload(wire, Label("sparse", 1, "up", wire.by_kind()), expected, ranks, by_examples)


def play(comm: Communicator, collective: str, bits: SumBits, secure: bool, by_examples: bool) -> Received | None:
    job = upload(bits, by_examples, comm.size)

    def updates() -> Iterator[tuple[Header, Tensor]]:
        for client, examples, rank in zip(CLIENTS, EXAMPLES, job.ranks, strict=True):
            if rank == comm.rank:
                yield Header(client, 0, 1, examples, 0.5, 0.1, job.wire.nbytes), update(client)

    return exact(Metered(comm, Ledger(comm.rank)), job, updates(), collective, secure)


def digests(comm: Communicator) -> list[str]:
    """What rank 0 ends with, in every case."""
    means = (play(comm, *case) for case in CASES)
    return [hashlib.sha256(mean.mean_N.numpy().tobytes()).hexdigest() if mean else "" for mean in means]


def rank(number: int, size: int, folder: str) -> list[str]:
    comm = TorchComm("gloo", number, size, FileStore(f"{folder}/store-{size}", size), 200.0)
    found = digests(comm)
    comm.close()
    return found


def test_any_way_and_any_number_of_ranks_give_the_same_bits(tmp_path: Path) -> None:
    alone = digests(Alone())
    assert run_ranks(3, rank, str(tmp_path), seconds=200)[0] == alone == run_ranks(6, rank, str(tmp_path), seconds=200)[0]
    by_case = dict(zip(CASES, alone, strict=True))
    kinds = {(bits, by_examples): {by_case[way, bits, masked, by_examples] for way, masked in product(("gather", "reduce"), (False, True))}
             for bits, by_examples in product((32, 64), (False, True))}  # fmt: skip
    assert all(len(found) == 1 for found in kinds.values()) and len(set(alone)) == 4


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("by_examples", [False, True])
def test_the_mean_is_the_mean(bits: SumBits, by_examples: bool) -> None:
    received = play(Alone(), "gather", bits, False, by_examples)
    assert received and [header.client for header in received.headers] == list(CLIENTS)
    weight_K = torch.tensor(EXAMPLES if by_examples else [1] * 5, dtype=torch.float64)
    delta_KN = torch.stack([update(client).double() for client in CLIENTS])
    wanted_N = (weight_K[:, None] * delta_KN).sum(0) / weight_K.sum()
    step = float((weight_K * delta_KN.abs().amax(1)).sum() / weight_K.sum()) * 2.0**-30 if bits == 32 else 1e-12
    torch.testing.assert_close(received.mean_N.double(), wanted_N, rtol=1e-7, atol=6 * step)


@given(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=40), st.sampled_from([32, 64]))
def test_the_sum_of_any_clients_fits(magnitudes: list[float], bits: SumBits) -> None:
    """Even where all clients have their largest value at the same place; and a scale of half the size would not do."""
    scale, wire = fixed.exponent(magnitudes, bits), Fixed(Support([Slot.whole("a", (2,), "value")]), bits)
    total = [0, 0]
    for magnitude in magnitudes:
        integers_N = wire.integers(torch.tensor([magnitude, -magnitude], dtype=torch.float64), 1.0, scale)
        total = [one + int(other) for one, other in zip(total, integers_N, strict=True)]
    assert -(2 ** (bits - 1)) < total[1] <= 0 <= total[0] < 2 ** (bits - 1)
    assert sum(magnitudes) / 2.0 ** (scale - 1) > 2 ** (bits - 1) - 3 - len(magnitudes) or not sum(magnitudes)


def test_an_update_that_is_not_finite_names_its_client() -> None:
    job = upload(32, False, 1)
    updates = [(Header(client, 0, 1, 1, 0.0, 0.0, job.wire.nbytes), update(client)) for client in CLIENTS]
    updates[2][1][5] = float("nan")
    with pytest.raises(RunError, match="client 5: the largest magnitude of its update is nan"):
        exact(Metered(Alone(), Ledger(0)), job, iter(updates), "gather", False)


def test_a_run_ends_in_the_same_bits_masked_or_not(tmp_path: Path) -> None:
    """Sparse values, factors and the head; and a run that is resumed."""
    plain = run(tmp_path / "plain", *SHORT, "comm.sum=exact")
    masked = run(tmp_path / "masked", *SHORT, "comm.sum=exact", "comm.secure=true", "comm.collective=reduce", stop_after=1)
    run(masked.path, resume=True)
    assert same(plain, masked)
    ledgers = [{line["kind"]: line for line in folder.lines("ledger") if line["round"] == 4} for folder in (plain, masked)]
    assert set(ledgers[1]) - set(ledgers[0]) == {"key"}, "only the keys come on top"
    for folder in (plain, masked):
        told = [
            line
            for line in folder.lines("ledger")
            if line["kind"] in ("header", "key") or (line["op"], line["kind"]) == ("gather", "scale")
        ]
        planned = plan(folder.config(), shell(folder.config().model, class_names(folder.config())), [])
        assert planned["payload_bytes"]["control"] == sum(line["payload_bytes"] for line in told)


@pytest.mark.parametrize(
    ("setting", "overrides"),
    [
        ("comm.secure", ["comm.secure=true"]),
        ("comm.secure", ["comm.secure=true", "comm.sum=exact", "clients.per_round=1"]),
        ("comm.sum", ["comm.sum=exact", "comm.wire.values=int8"]),
        ("comm.sum", ["comm.sum=exact", "comm.wire.topk=0.1", "comm.wire.indices=gap"]),
        ("comm.sum", ["comm.sum=exact", "method.lowrank.rule=svd"]),
        ("comm.sum_bits", ["comm.sum=exact", "comm.sum_bits=16"]),
    ],
)
def test_what_cannot_be_summed_exactly_is_refused(setting: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(*overrides)
    assert error.value.setting == setting
