"""Ten thousand bad frames and a thousand bad configs: each ends in its one clear error, and never in another exception.

Frames come to rank 0 by the run's own way, from a sender that means harm: it knows the format, and makes checksums that fit. The fuzzers in
``fuzz/`` go on from here for as long as they are let.
"""

import math
import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from slora_dist import settings, upload
from slora_dist.comm.alone import Alone
from slora_dist.comm.metered import Metered
from slora_dist.config import Config, Indices, Values
from slora_dist.errors import ConfigError, RunError
from slora_dist.exactsum import exact
from slora_dist.fixed import Fixed
from slora_dist.ledger import Label, Ledger
from slora_dist.runfolder import Checkpoint, RunFolder
from slora_dist.settings import validate
from slora_dist.support import Slot, Support
from slora_dist.topk import TopK
from slora_dist.upload import Upload
from slora_dist.wire import HEADER_BYTES, Header, Wire, as_bytes, frame
from tests.hostile import Bomb, spoilt
from tests.tiny import TINY, tiny

FRAMES, CONFIGS = 10_000, 1_000
SUPPORT = Support([Slot("a", (20, 25), "value", 60, mask_seed=1), Slot.whole("b", (4, 10), "factor_a"), Slot.whole("c", (7,), "head")])
N = SUPPORT.numel
FIXED: list[tuple[Values, Indices]] = [
    ("float32", "gap"), ("bfloat16", "int32"), ("float16", "gap+zstd"), ("int8", "gap"), ("int4", "implicit"),
]  # fmt: skip
TOP: list[tuple[Values, Indices]] = [("float32", "int32"), ("int8", "gap"), ("int4", "gap+zstd")]
WIRES: dict[str, Wire | TopK | Fixed] = {
    **{f"{values}-{indices}": Wire(SUPPORT, values, indices) for values, indices in FIXED},
    **{f"top-{values}-{indices}": TopK(SUPPORT, values, indices, 0.2) for values, indices in TOP},
    "exact": Fixed(SUPPORT, 32),
}
Rng = random.Random


def header(client: int, wire: Wire | TopK | Fixed) -> Header:
    return Header(client, 1, 7, 240, 1.25, 0.5, wire.nbytes)


def body(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    update_N = torch.randn(N, generator=torch.Generator().manual_seed(rng.randrange(1 << 32)))
    return wire.integers(update_N, 1.0, -20).view(torch.uint8) if isinstance(wire, Fixed) else wire.encode(update_N)


class Peer(Alone):
    """A world of one whose gather hands over what a peer has sent; a message whose size all ranks know is cut off or fails before."""

    def __init__(self, message_B: Tensor) -> None:
        super().__init__(64)
        self.message_B = message_B

    def gather(self, messages: Any, senders: Sequence[int], nbytes: int | None) -> Iterator[Any]:
        if nbytes == 8:  # the magnitude for an exact sum
            return super().gather([torch.ones(1, dtype=torch.float64).view(torch.uint8)], senders, nbytes)
        if nbytes not in (None, self.message_B.numel()):
            raise RunError("the transport has other sizes")
        return super().gather([self.message_B], senders, nbytes)


def receive(wire: Wire | TopK | Fixed, message_B: Tensor) -> None:
    """Let rank 0 read a message as client 3's of round 7."""
    job = Upload(wire, Label("sparse", 7, "up", wire.by_kind()), [header(3, wire)], [0], True)
    comm = Metered(Peer(message_B), Ledger(0))
    if isinstance(wire, Fixed):
        exact(comm, job, iter([(header(3, wire), torch.zeros(N))]), "gather", False)
    else:
        upload.gather(comm, job, iter(()))


def flipped(message_B: Tensor, rng: Rng) -> Tensor:
    message_B = message_B.clone()
    for _ in range(rng.choice((1, 1, 2, 9))):
        message_B[rng.randrange(len(message_B))] ^= 1 << rng.randrange(8)
    return message_B


def damaged(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    """Bits that flipped on the way: checksums do not fit."""
    message_B = frame(header(3, wire), body(wire, rng))
    changed_B = flipped(message_B, rng)
    return changed_B if not torch.equal(changed_B, message_B) else flipped(changed_B[: HEADER_BYTES - 4], rng)


def cut(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    message_B = frame(header(3, wire), body(wire, rng))
    return message_B[: rng.randrange(len(message_B))]


def cut_and_sealed(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    body_B = body(wire, rng)
    return frame(header(3, wire), body_B[: rng.randrange(len(body_B))])


def too_long(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    return frame(header(3, wire), torch.cat([body(wire, rng), as_bytes(rng.randbytes(rng.randrange(1, 3000)))]))


def noise(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    return as_bytes(rng.randbytes(rng.randrange(1, 2 * wire.nbytes)))


def somebody_else(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    """A message of another client, phase or round, from no document, or that lies about its length."""
    field = rng.choice(("client", "phase", "round", "num_examples", "body_bytes"))
    other = replace(header(3, wire), **{field: 0 if field == "num_examples" else rng.randrange(300, 1 << 31)})
    body_B = body(wire, rng)
    if field != "body_bytes":
        return frame(other, body_B)
    return torch.cat([other.pack(), body_B])


def another_version(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    message_B = frame(header(3, wire), body(wire, rng))
    message_B[rng.choice((0, 3, 4, 5))] ^= rng.randrange(1, 256)
    return message_B


def another_format(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    other = WIRES[rng.choice([name for name, one in WIRES.items() if one.nbytes != wire.nbytes])]
    return frame(header(3, wire), body(other, rng))


def other_positions(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    """Positions that are not the mask's, or do not ascend, or lie outside; or scales and integers that no encoder makes."""
    body_B = body(wire, rng)
    if isinstance(wire, TopK):
        tail = len(body_B) - wire.scale_bytes - wire.value_bytes
        if wire.indices == "int32":
            wrong = rng.choice(([0, 0], [5, 4], [N], [-1], [1 << 30]))
            index_k = body_B[-tail:].clone().view(torch.int32)
            index_k[-len(wrong) :] = torch.tensor(wrong, dtype=torch.int32)
            return frame(header(3, wire), torch.cat([body_B[:-tail], index_k.view(torch.uint8)]))
        return frame(header(3, wire), torch.cat([body_B[:-tail], as_bytes(bytes(rng.choice((1, wire.k - 1, wire.k + 1, 399))))]))
    if isinstance(wire, Wire) and wire.index_bytes:
        body_B[rng.randrange(wire.index_bytes)] ^= rng.randrange(1, 256)
        return frame(header(3, wire), body_B)
    return cut(wire, rng)


def other_scales(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    if isinstance(wire, Fixed) or not wire.scale_bytes:
        return other_positions(wire, rng)
    body_B, at = body(wire, rng), wire.index_bytes if isinstance(wire, Wire) else 0
    at += 4 * rng.randrange(wire.scale_bytes // 4)
    body_B[at : at + 4] = torch.tensor([rng.choice((math.nan, math.inf, -math.inf, -1.0))]).view(torch.uint8)
    return frame(header(3, wire), body_B)


def other_figures(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    """More documents than the client has, which would be its weight; a loss or seconds that are no number."""
    wrong = rng.choice(({"num_examples": rng.choice((1, 239, 1 << 31))}, {"loss": math.nan}, {"loss": math.inf}, {"seconds": -1.0}))
    return frame(replace(header(3, wire), **wrong), body(wire, rng))


def pickled(wire: Wire | TopK | Fixed, rng: Rng) -> Tensor:
    """What would run a command if anybody unpickled it."""
    data = pickle.dumps(Bomb())
    return frame(header(3, wire), as_bytes(data)) if rng.random() < 0.5 else as_bytes(data)


ATTACKS = (
    damaged, cut, cut_and_sealed, too_long, noise, somebody_else, another_version, another_format, other_positions, other_scales,
    other_figures, pickled,
)  # fmt: skip


def test_every_bad_frame_is_refused_with_one_clear_error() -> None:
    rng, said = Rng(7), set[str]()
    cases = islice(cycle([(name, attack) for name in WIRES for attack in ATTACKS]), FRAMES)
    for number, (name, attack) in enumerate(cases):
        message_B = attack(WIRES[name], rng)
        try:
            receive(WIRES[name], message_B)
        except RunError as error:
            said.add("".join(letter for letter in str(error) if not letter.isdigit()))
            continue
        raise AssertionError(f"frame {number}, {attack.__name__} of {name}, was taken")
    assert len(said) > 12 and all(len(text) < 200 and "\n" not in text for text in said)


def test_good_frames_are_taken() -> None:
    for wire in WIRES.values():
        receive(wire, frame(header(3, wire), body(wire, Rng(1))))


def test_any_bytes_are_an_update_or_refused() -> None:
    """A broadcast has no header: what decodes has the length, and what does not raises ``RunError``."""
    rng = Rng(3)
    for _ in range(2000):
        wire = WIRES[rng.choice([name for name, one in WIRES.items() if isinstance(one, Wire)])]
        assert isinstance(wire, Wire)
        try:
            assert wire.decode(flipped(wire.encode(torch.ones(N)), rng)).shape == (N,)
        except RunError:
            continue


def test_every_bad_config_gives_one_clear_error() -> None:
    rng, good, refused = Rng(11), tiny("method.name=custom", "method.phases=[{kind: sparse}, {kind: lowrank}]").model_dump(), 0
    while refused < CONFIGS:
        tree = spoilt(good, rng)
        try:
            assert isinstance(validate(tree), Config)  # some garbage is a setting's value
        except ConfigError as error:
            refused += 1
            assert error.setting is not None and error.problem and error.allowed and len(str(error).splitlines()) == 1


def test_bad_files_and_overrides_give_one_clear_error(tmp_path: Path) -> None:
    rng, path, refused = Rng(5), tmp_path / "bad.yaml", 0
    text = yaml.safe_dump(tiny().model_dump())
    for _ in range(150):
        at = rng.randrange(len(text))
        path.write_text(
            text[:at] + rng.choice(("{", "\t", ": :", "- -", "&a", "*a", "!!python/object:os.system", "\x07", "'")) + text[at + 1 :]
        )
        name = rng.choice(("run.seed", "method.sparse", "comm.wire.values", "method.phases.0.kind", "data", ".", "a.b.c.d", "run.seed.x"))
        try:
            settings.load(path, [f"{name}={rng.choice(('1', '{', '[', '~', '{a: 1}', 'x: y: z', '-'))}"])
        except ConfigError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 100


@pytest.mark.parametrize(
    "text", ["2026-99-99", "[" * 5000, "9" * 5000, "{[a]: b}", "!!python/object:os.system {}", "? {a: 1}", "\x00", "a: *b"]
)
def test_yaml_that_breaks_its_reader_gives_one_clear_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"run: {text}")
    for overrides in ([], [f"run.seed={text}"]):
        with pytest.raises(ConfigError) as error:
            settings.load(path if not overrides else TINY, overrides)
        assert len(str(error.value)) < 1000 or overrides


def test_a_damaged_checkpoint_is_refused_and_nothing_in_it_is_unpickled(tmp_path: Path) -> None:
    rng, folder = Rng(2), RunFolder(tmp_path)
    folder.save(Checkpoint({"offset": torch.arange(50.0)}, {"round": 3, "phase": 0, "switch": None, "score": None, "unjudged": None}))
    state = tmp_path / "checkpoint" / "round-00003" / "state.safetensors"
    values, whole, told = state.with_suffix(".json"), state.read_bytes(), state.with_suffix(".json").read_bytes()
    spoils = [lambda: whole[: rng.randrange(len(whole))], lambda: rng.randbytes(200), lambda: pickle.dumps(Bomb()), lambda: b""]
    for spoil in spoils * 25:
        state.write_bytes(spoil())
        with pytest.raises(ConfigError, match="cannot be read"):
            folder.latest()
    state.write_bytes(whole)
    for wrong in (told[:9], pickle.dumps(Bomb()), b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b"3"):
        values.write_bytes(wrong)
        with pytest.raises(ConfigError, match="cannot be read"):
            folder.latest()
