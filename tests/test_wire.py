import math
import struct
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from slora_dist import codec
from slora_dist.config import CommConfig, Indices, Values, WireConfig
from slora_dist.errors import RunError
from slora_dist.formats import FORMATS
from slora_dist.support import Slot, Support
from slora_dist.wire import HEADER_BYTES, Header, Wire, Wires, as_bytes

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
    if wire.format.largest:
        size, steps = (128, 127) if name.startswith("int8") else (32, 7)
        largest_N = torch.cat([block.abs().max().expand(len(block)) for block in offset_N.split(size)])
        assert ((decoded_N - offset_N).abs() <= largest_N / steps * 0.5001).all(), "half a step of the block"
    else:  # a scale that is a power of two changes no rounding
        assert torch.equal(decoded_N, offset_N.to(wire.format.dtype).float())


@every_wire
def test_bytes_are_the_closed_form(name: str) -> None:
    wire, values = WIRES[name], name.partition("-")[0]
    index = {"implicit": 0, "int32": 4 * MASKED}.get(name.partition("-")[2], -(-len(coded("zstd" in name)) // 4) * 4)
    scale = {"float16": 4, "int8": 4 * 4, "int4": 4 * 13}.get(values, 0)  # of 411 values: one, one for 128 or for 32
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}[values]
    assert wire.nbytes == sum(wire.by_kind().values()) == index + scale + math.ceil(size * N)
    expected = {"index": index, "scale": scale, "value": MASKED * size, "factor_a": 60 * size, "head": math.ceil(13 * size)}
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


@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 1e-8, 1e-6, 1e30])
@pytest.mark.parametrize(("values", "error"), [("float16", 0.002), ("int8", 0.02), ("int4", 0.3)])
def test_updates_of_any_size_are_kept(values: Values, error: float, magnitude: float) -> None:
    """Scales are float32, so that an update of 1e-8 is not lost; below the smallest normal float they round themselves."""
    wire = Wire(SUPPORT, values, "implicit")
    offset_N = some_offset() * magnitude
    offset_N[:128] = 0
    decoded_N = wire.decode(wire.encode(offset_N))
    assert not decoded_N[:128].any()
    torch.testing.assert_close(decoded_N, offset_N, rtol=0, atol=max(error * magnitude, 2e-43 / error**0.5))


@given(arrays(np.float32, st.integers(1, 300), elements=st.floats(-(2.0**99), 2.0**99, width=32)), st.sampled_from(get_args(Values)))
def test_what_comes_back_is_sent_again_without_loss(values: NDArray[np.float32], name: Values) -> None:
    """Bytes of any vector have the closed form's length, and a vector that has passed the wire once passes it unchanged, or nearly."""
    form, values_N = FORMATS[name], torch.from_numpy(values)
    *scales, values_B = form.encode(values_N)
    assert values_B.numel() == form.value_bytes(len(values_N))
    scales_S = scales[0].view(torch.float32) if scales else torch.zeros(0)
    assert len(scales_S) == form.scales(len(values_N))
    start, decoded_N = form.decode(0, values_B, scales_S, len(values_N))
    assert start == 0 and decoded_N.shape == values_N.shape and decoded_N.isfinite().all()
    *scales, values_B = form.encode(decoded_N)
    again_N = form.decode(0, values_B, scales[0].view(torch.float32) if scales else scales_S, len(values_N))[1]
    torch.testing.assert_close(again_N, decoded_N, rtol=1e-5, atol=1e-43)


@pytest.mark.parametrize("values", get_args(Values))
def test_what_rounding_takes_from_a_broadcast_is_not_lost(values: Values) -> None:
    """Clients go on from what the bytes say, but the server keeps its offset: steps far below a step of the format add up."""
    wire, goal_N = Wire(SUPPORT, values, "implicit"), some_offset()
    offset_N = torch.zeros_like(goal_N)
    for _ in range(400):
        offset_N += 0.02 * (goal_N - wire.decode(wire.encode(offset_N)))
    step = float(goal_N.abs().max()) / (wire.format.largest or 256)
    assert (wire.decode(wire.encode(offset_N)) - goal_N).abs().max() < 1.1 * step + 0.002, "a step of 0.02 would never leave zero in int4"


def test_each_way_has_its_own_format() -> None:
    wires = Wires.of(SUPPORT, CommConfig(wire=WireConfig(values="int8", up_values="int4")))
    assert (wires.up.format, wires.down.format) == (FORMATS["int4"], FORMATS["int8"])
    wires = Wires.of(SUPPORT, CommConfig(wire=WireConfig(down_values="bfloat16", indices="int32")))
    assert (wires.up.format, wires.down.format) == (FORMATS["float32"], FORMATS["bfloat16"])
    assert wires.up.index_bytes == wires.down.index_bytes == 4 * MASKED


@pytest.mark.parametrize("values", ["float16", "int8", "int4"])
def test_what_no_encoder_makes_is_refused(values: Values) -> None:
    wire = Wire(SUPPORT, values, "gap")
    for scale in (float("nan"), float("inf"), -1.0):
        wire_B = wire.encode(some_offset())
        wire_B[wire.index_bytes : wire.index_bytes + 4] = torch.tensor([scale]).view(torch.uint8)
        with pytest.raises(RunError, match="no encoder makes"):
            wire.decode(wire_B)
    for wrong in (float("nan"), 0.0) if values == "float16" else ():
        with pytest.raises(RunError, match="no encoder makes"):
            wire.decode(wire.encode(torch.full_like(some_offset(), wrong).log()))
    wire_B = wire.encode(some_offset())
    wire_B[-2:] = torch.tensor({"float16": [0, 0x7C], "int8": [0, 128], "int4": [0x80, 0]}[values])  # infinity, -128, -8
    with pytest.raises(RunError, match="no encoder makes"):
        wire.decode(wire_B)
    if values == "int4":
        wire_B = wire.encode(some_offset())
        wire_B[-1] |= 16  # beside the last of 411 values
        with pytest.raises(RunError, match="behind the last"):
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


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16"])
def test_a_cut_through_a_value_is_refused(values: Values) -> None:
    wire = Wire(SUPPORT, values, "gap")
    with pytest.raises(RunError, match="cuts a value in two"):
        wire.decode_chunk(wire.index_bytes + wire.scale_bytes, wire.encode(some_offset())[:5])


def test_header_round_trip() -> None:
    assert HEADER.pack().shape == (HEADER_BYTES,)
    assert Header.unpack(HEADER.pack(), HEADER) == HEADER
    told = replace(HEADER, loss=0.0, seconds=9.0)
    assert Header.unpack(HEADER.pack(), told) == HEADER, "what only the client can know is not held against anything"
    unknown = replace(HEADER, num_examples=0)
    assert Header.unpack(HEADER.pack(), unknown) == HEADER, "nor is its size, where its documents are its own"
    with pytest.raises(RunError, match="trained on 240 examples, it has 1"):
        Header.unpack(HEADER.pack(), replace(HEADER, num_examples=1))


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
