import struct
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from slora_dist.errors import RunError
from slora_dist.support import Slot, Support
from slora_dist.wire import HEADER_BYTES, Header, Wire, as_bytes

Values = Literal["float32", "bfloat16"]
Indices = Literal["implicit", "explicit"]

SUPPORT = Support(
    [
        Slot("a", (40, 50), "value", 333, mask_seed=1),
        Slot("b", (7,), "value", 5, mask_seed=2),
        Slot.whole("c", (20, 3), "factor_a"),
        Slot.whole("d", (13,), "head"),
    ]
)
HEADER = Header(client=3, phase=1, round=7, num_examples=240, loss=1.25, seconds=0.5, body_bytes=1 << 33)
every_wire = pytest.mark.parametrize(
    "wire",
    [Wire(SUPPORT, values, indices) for values in ("float32", "bfloat16") for indices in ("implicit", "explicit")],  # type: ignore[arg-type]
    ids=lambda wire: f"{wire.dtype}-{'explicit' if wire.explicit else 'implicit'}",
)


def some_offset() -> Tensor:
    return torch.randn(SUPPORT.numel, generator=torch.Generator().manual_seed(0))


@every_wire
def test_round_trip(wire: Wire) -> None:
    offset_N = some_offset()
    wire_B = wire.encode(offset_N)
    assert wire_B.dtype == torch.uint8 and wire_B.is_contiguous() and wire_B.shape == (wire.nbytes,)
    assert torch.equal(wire.decode(wire_B), offset_N.to(wire.dtype).float())


@every_wire
def test_bytes_are_the_closed_form(wire: Wire) -> None:
    values, index = wire.dtype.itemsize, 4 * 338 if wire.explicit else 0
    assert wire.nbytes == sum(wire.by_kind().values()) == index + values * (338 + 60 + 13)
    expected = {"value": 338 * values, "factor_a": 60 * values, "head": 13 * values}
    assert wire.by_kind() == ({"index": index} if index else {}) | expected


def test_explicit_positions_are_little_endian_int32_within_their_tensor() -> None:
    wire_B = Wire(SUPPORT, "float32", "explicit").encode(some_offset())
    positions = struct.unpack("<338i", wire_B[: 4 * 338].numpy().tobytes())
    assert list(positions) == [at for slot in SUPPORT.slots[:2] for at in slot.index.tolist()]  # type: ignore[union-attr]


@every_wire
@pytest.mark.parametrize("step", [64, 192, 4096])
def test_chunks_decode_to_what_the_whole_does(wire: Wire, step: int) -> None:
    """A message behind its header, in one buffer, cut at multiples of 64 bytes: cuts fall inside positions and values."""
    buffer_B = torch.cat([HEADER.pack(), wire.encode(some_offset())])
    decoded_N = torch.full((SUPPORT.numel,), float("nan"))
    for at in range(0, buffer_B.numel(), step):
        chunk_b = buffer_B[max(at, HEADER_BYTES) : at + step].clone()
        start, values_n = wire.decode_chunk(max(at, HEADER_BYTES) - HEADER_BYTES, chunk_b)
        decoded_N[start : start + values_n.numel()] = values_n
    assert torch.equal(decoded_N, wire.decode(buffer_B[HEADER_BYTES:]))


def test_a_slice_of_a_buffer_at_an_odd_place_decodes() -> None:
    wire = Wire(SUPPORT, "float32", "implicit")
    shifted_B = torch.cat([torch.zeros(3, dtype=torch.uint8), wire.encode(some_offset())])
    assert torch.equal(wire.decode(shifted_B[3:]), some_offset())


def test_wrong_positions_are_refused_wherever_they_are() -> None:
    wire = Wire(SUPPORT, "float32", "explicit")
    for at in (0, 700, 4 * 338 - 1):
        wire_B = wire.encode(some_offset())
        wire_B[at] ^= 1
        with pytest.raises(RunError, match="positions"):
            wire.decode(wire_B)
        start = at // 64 * 64
        with pytest.raises(RunError, match="positions"):
            wire.decode_chunk(start, wire_B[start : start + 64])


@every_wire
def test_wrong_lengths_are_refused(wire: Wire) -> None:
    wire_B = wire.encode(some_offset())
    for wrong_B in (wire_B[:-1], wire_B[:0], torch.cat([wire_B, wire_B[:1]])):
        with pytest.raises(RunError, match=f"{wrong_B.numel()} bytes where {wire.nbytes}"):
            wire.decode(wrong_B)
    with pytest.raises(RunError, match="cuts a value in two"):
        wire.decode_chunk(wire.index_bytes, wire_B[wire.index_bytes : wire.index_bytes + 5])


def test_header_round_trip() -> None:
    assert HEADER.pack().shape == (HEADER_BYTES,)
    assert Header.unpack(HEADER.pack(), HEADER) == HEADER
    told = replace(HEADER, num_examples=1, loss=0.0, seconds=9.0)
    assert Header.unpack(HEADER.pack(), told) == HEADER, "what only the client can know is not held against anything"


@pytest.mark.parametrize("field", ["client", "phase", "round", "body_bytes"])
def test_a_header_of_another_message_is_refused(field: str) -> None:
    with pytest.raises(RunError, match=f"client 3.*{field}|client 4.*{field}"):
        Header.unpack(HEADER.pack(), replace(HEADER, **{field: getattr(HEADER, field) + 1}))


def test_a_damaged_header_is_refused() -> None:
    for at in (0, 4):  # magic, version
        header_B = HEADER.pack()
        header_B[at] ^= 1
        with pytest.raises(RunError, match="not a slora_dist message"):
            Header.unpack(header_B, HEADER)
    with pytest.raises(RunError, match="no example"):
        Header.unpack(replace(HEADER, num_examples=0).pack(), HEADER)


def test_as_bytes_owns_its_memory() -> None:
    assert as_bytes(b"").shape == (0,) and as_bytes(b"\x01\xff").tolist() == [1, 255]
