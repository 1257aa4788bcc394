import struct
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from slora_dist import codec
from slora_dist.errors import RunError
from slora_dist.support import Slot, Support
from slora_dist.wire import HEADER_BYTES, Header, Indices, Values, Wire, as_bytes

SUPPORT = Support(
    [
        Slot("a", (40, 50), "value", 333, mask_seed=1),
        Slot("b", (7,), "value", 5, mask_seed=2),
        Slot.whole("c", (20, 3), "factor_a"),
        Slot.whole("d", (13,), "head"),
    ]
)
N, MASKED = 338 + 60 + 13, 338
HEADER = Header(client=3, phase=1, round=7, num_examples=240, loss=1.25, seconds=0.5, body_bytes=1 << 33)
WIRES = {f"{values}-{indices}": Wire(SUPPORT, values, indices) for values in get_args(Values) for indices in get_args(Indices)}
every_wire = pytest.mark.parametrize("name", WIRES)


def some_offset() -> Tensor:
    return torch.randn(SUPPORT.numel, generator=torch.Generator().manual_seed(0))


@every_wire
def test_round_trip(name: str) -> None:
    wire, offset_N = WIRES[name], some_offset()
    wire_B = wire.encode(offset_N)
    assert wire_B.dtype == torch.uint8 and wire_B.is_contiguous() and wire_B.shape == (wire.nbytes,)
    decoded_N = wire.decode(wire_B)
    assert decoded_N.dtype == torch.float32
    if wire.scale_bytes:
        largest_N = torch.cat([block.abs().max().expand(len(block)) for block in offset_N.split(128)])
        assert ((decoded_N - offset_N).abs() <= largest_N / 127 * 0.5001).all(), "half a step of the block"
    else:
        assert torch.equal(decoded_N, offset_N.to(wire.dtype).float())


@every_wire
def test_bytes_are_the_closed_form(name: str) -> None:
    wire, size = WIRES[name], WIRES[name].dtype.itemsize
    index = {"implicit": 0, "int32": 4 * MASKED}.get(name.partition("-")[2], -(-len(coded("zstd" in name)) // 4) * 4)
    scale = 4 * 4 if name.startswith("int8") else 0
    assert wire.nbytes == sum(wire.by_kind().values()) == index + scale + size * N
    expected = {"index": index, "scale": scale, "value": MASKED * size, "factor_a": 60 * size, "head": 13 * size}
    assert wire.by_kind() == {kind: count for kind, count in expected.items() if count}


def coded(compact: bool) -> Tensor:
    """The code of the two masks, the second one behind the 2000 entries of the first."""
    first, second = (slot.index for slot in SUPPORT.slots[:2])
    assert first is not None and second is not None
    return codec.encode(torch.cat([first, second + 2000]), 2007, compact)


@pytest.mark.parametrize("indices", ["gap", "gap+zstd"])
def test_gaps_run_over_all_tensors_and_end_in_zeros(indices: Indices) -> None:
    code_B = coded(indices == "gap+zstd")
    wire = Wire(SUPPORT, "float32", indices)
    start_B = wire.encode(some_offset())[: wire.index_bytes]
    assert torch.equal(start_B[: len(code_B)], code_B) and not start_B[len(code_B) :].any() and len(start_B) % 4 == 0


def test_int32_positions_are_little_endian_within_their_tensor() -> None:
    wire_B = Wire(SUPPORT, "float32", "int32").encode(some_offset())
    positions = struct.unpack("<338i", wire_B[: 4 * 338].numpy().tobytes())
    assert list(positions) == [at for slot in SUPPORT.slots[:2] for at in slot.index.tolist()]  # type: ignore[union-attr]


@every_wire
@pytest.mark.parametrize("step", [64, 192, 4096])
def test_chunks_decode_to_what_the_whole_does(name: str, step: int) -> None:
    """Messages behind their headers, in one buffer, cut at multiples of 64 bytes: cuts fall inside positions, scales and values."""
    wire = WIRES[name]
    for offset_N in (some_offset(), 3 * some_offset()):
        buffer_B = torch.cat([HEADER.pack(), wire.encode(offset_N)])
        decoded_N = torch.full((SUPPORT.numel,), float("nan"))
        for at in range(0, buffer_B.numel(), step):
            chunk_b = buffer_B[max(at, HEADER_BYTES) : at + step].clone()
            start, values_n = wire.decode_chunk(max(at, HEADER_BYTES) - HEADER_BYTES, chunk_b)
            decoded_N[start : start + values_n.numel()] = values_n
        assert torch.equal(decoded_N, wire.decode(buffer_B[HEADER_BYTES:]))


def test_float32_is_decoded_where_it_lies() -> None:
    wire_B = Wire(SUPPORT, "float32", "implicit").encode(some_offset())
    assert Wire(SUPPORT, "float32", "implicit").decode(wire_B).data_ptr() == wire_B.data_ptr()


@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 1e-6, 1e30])
def test_int8_keeps_updates_of_any_size(magnitude: float) -> None:
    """Scales are float32, so that an update of 1e-6 is not lost; below the smallest normal float they round themselves."""
    wire = Wire(SUPPORT, "int8", "implicit")
    offset_N = some_offset() * magnitude
    offset_N[:128] = 0
    decoded_N = wire.decode(wire.encode(offset_N))
    assert not decoded_N[:128].any()
    torch.testing.assert_close(decoded_N, offset_N, rtol=0, atol=max(0.02 * magnitude, 3e-43))


def test_what_no_encoder_makes_is_refused() -> None:
    wire = Wire(SUPPORT, "int8", "gap")
    for scale in (float("nan"), float("inf"), -1.0):
        wire_B = wire.encode(some_offset())
        wire_B[wire.index_bytes : wire.index_bytes + 4] = torch.tensor([scale]).view(torch.uint8)
        with pytest.raises(RunError, match="no encoder makes"):
            wire.decode(wire_B)
    wire_B = wire.encode(some_offset())
    wire_B[-1] = 128  # -128 as an integer
    with pytest.raises(RunError, match="no encoder makes"):
        wire.decode(wire_B)


def test_a_slice_of_a_buffer_at_an_odd_place_decodes() -> None:
    wire = Wire(SUPPORT, "float32", "implicit")
    shifted_B = torch.cat([torch.zeros(3, dtype=torch.uint8), wire.encode(some_offset())])
    assert torch.equal(wire.decode(shifted_B[3:]), some_offset())


@pytest.mark.parametrize("indices", ["gap", "gap+zstd", "int32"])
def test_wrong_positions_are_refused_wherever_they_are(indices: Indices) -> None:
    wire = Wire(SUPPORT, "float32", indices)
    for at in (0, 200, wire.index_bytes - 1):
        wire_B = wire.encode(some_offset())
        wire_B[at] ^= 1
        with pytest.raises(RunError, match="positions"):
            wire.decode(wire_B)
        start = at // 64 * 64
        with pytest.raises(RunError, match="positions"):
            wire.decode_chunk(start, wire_B[start : start + 64])


@every_wire
def test_wrong_lengths_are_refused(name: str) -> None:
    wire = WIRES[name]
    wire_B = wire.encode(some_offset())
    for wrong_B in (wire_B[:-1], wire_B[:0], torch.cat([wire_B, wire_B[:1]])):
        with pytest.raises(RunError, match=f"{wrong_B.numel()} bytes where {wire.nbytes}"):
            wire.decode(wrong_B)


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_a_cut_through_a_value_is_refused(values: Values) -> None:
    wire = Wire(SUPPORT, values, "gap")
    with pytest.raises(RunError, match="cuts a value in two"):
        wire.decode_chunk(wire.index_bytes, wire.encode(some_offset())[wire.index_bytes :][:5])


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
