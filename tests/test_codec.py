"""Positions as bytes. Legend: M positions, B bytes."""

import math

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from slora_dist import codec
from slora_dist.errors import RunError
from slora_dist.masks import random_mask

both = pytest.mark.parametrize("compact", [False, True], ids=["gap", "gap+zstd"])


def positions(*index: int) -> Tensor:
    return torch.tensor(index, dtype=torch.int64)


@both
@given(index=st.sets(st.integers(0, 5000), max_size=60), spare=st.integers(1, 700))
@example(index=set(), spare=0)
@example(index={0}, spare=1)
@example(index={254, 509, 765, 1275}, spare=1)  # the gaps around an escape and around two
def test_round_trip(compact: bool, index: set[int], spare: int) -> None:
    index_M = positions(*sorted(index))
    numel = max(index, default=0) + spare
    code_B = codec.encode(index_M, numel, compact)
    assert code_B.dtype == torch.uint8
    assert torch.equal(codec.decode(code_B, numel, compact), index_M)


@both
def test_a_code_of_many_blocks(compact: bool) -> None:
    index_M = random_mask(9_000_000, 300_000, seed=1)
    assert torch.equal(codec.decode(codec.encode(index_M, 9_000_000, compact), 9_000_000, compact), index_M)


def test_the_bytes_are_those_of_the_format() -> None:
    assert codec.encode(positions(0, 1, 255, 256, 511, 767, 1278), 1279).tolist() == [0, 0, 253, 0, 254, 255, 0, 255, 255, 0]


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_a_random_masks_code_is_as_short_as_promised(density: float) -> None:
    """The plain one takes a byte and one more for every 255 places; the compact one is within 1.5 % of the mask's entropy."""
    numel = 4_000_000
    index_M = random_mask(numel, round(density * numel), seed=1)
    gap, compact = (codec.encode(index_M, numel, packed).numel() / len(index_M) for packed in (False, True))
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8 / density
    assert gap == pytest.approx(1 / (1 - (1 - density) ** 255), rel=2e-3)
    assert entropy < compact < 1.015 * entropy


@given(code=st.binary(max_size=40), numel=st.integers(0, 3000))
def test_any_bytes_are_a_code_or_refused(code: bytes, numel: int) -> None:
    """What decodes ascends below ``numel`` and has no other code: it encodes to the same bytes."""
    code_B = torch.tensor(list(code), dtype=torch.uint8)
    try:
        index_M = codec.decode(code_B, numel)
    except RunError:
        return
    assert torch.equal(codec.encode(index_M, numel), code_B)  # encode asserts order and range


def zstd(data: bytes, **options: bool) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(zstandard.ZstdCompressor(**options).compress(data)), dtype=np.uint8))


@pytest.mark.parametrize("end", [255, 9])
def test_positions_beyond_the_tensor_are_refused(end: int) -> None:
    with pytest.raises(RunError, match="end within a gap" if end == 255 else "position 18 of 18"):
        codec.decode(torch.tensor([3, 4, end], dtype=torch.uint8), 18)


@pytest.mark.parametrize(
    ("frame_B", "message"),
    [
        (zstd(b"")[:0], "do not decompress"),
        (zstd(bytes(50))[:-3], "do not decompress"),
        (torch.cat([zstd(bytes(50)), zstd(bytes(50))]), "do not decompress"),
        (torch.arange(40, dtype=torch.uint8), "do not decompress"),
        (zstd(bytes(1 << 20)), "1048576 bytes, of 100"),  # a bomb says so before it goes off
        (zstd(bytes(50), write_content_size=False), "bytes, of 100"),
        (zstd(bytes(50) + b"\xff"), "end within a gap"),
        (zstd(b"\xff" + bytes(3)), "position 257 of 100"),
    ],
    ids=["nothing", "cut", "doubled", "noise", "bomb", "size untold", "open gap", "beyond"],
)
def test_hostile_frames_are_refused(frame_B: Tensor, message: str) -> None:
    with pytest.raises(RunError, match=message):
        codec.decode(frame_B, 100, compact=True)


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_damaged_frame_never_ends_in_anything_but_positions_or_a_refusal(at: int, bit: int) -> None:
    frame_B = codec.encode(random_mask(20_000, 300, seed=1), 20_000, compact=True)
    frame_B[at % len(frame_B)] ^= 1 << bit
    try:
        index_M = codec.decode(frame_B, 20_000, compact=True)
    except RunError:
        return
    assert not len(index_M) or (bool((index_M.diff() > 0).all()) and index_M[0] >= 0 and index_M[-1] < 20_000)
