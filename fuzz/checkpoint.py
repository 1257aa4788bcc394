"""Checkpoints as one string of bytes: how a valid one is made, taken apart, and damaged where it hurts.

A fuzzer that flips bits seldom gets past a reader of JSON. So a mutation is made at one place of the structure: a value of the state, or
the name, dtype, shape or offsets of a tensor; the rest stays valid, lengths are mended.
"""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slora_dist.aggregate.server import Server
from slora_dist.config import ServerConfig

NUMBERS = 5  # coordinates
OPTIMISERS = ("sgd", "adam", "yogi")
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 1e308, float("nan"), "", "0", "F32", "F64", "I8", "U64", "BOOL", "offset",
    [], [0], [5], [-1], [5, 1], [0, 20], {}, {"a": 1},
)  # fmt: skip
State = dict[str, Any]


def server(optimiser: str) -> Server:
    """Return a server whose optimiser has made a step."""
    made = Server(ServerConfig.model_validate({"optimizer": optimiser, "momentum": 0.5}), torch.zeros(NUMBERS), 2)
    made.step(torch.arange(NUMBERS, dtype=torch.float32))
    return made


def seeds() -> list[bytes]:
    """Return a valid checkpoint of each optimiser, with and without what may be there besides."""
    plain: State = {"round": 1, "phase": 0, "switch": None, "score": None, "unjudged": None}
    full = plain | {"switch": {"accuracy_before": 0.5}, "score": {"accuracy": 0.5, "loss": 1.25}, "unjudged": {"round": 1}}
    more = {"held": torch.zeros(NUMBERS), "mask": torch.zeros(1, dtype=torch.uint8), "base.weight": torch.ones(2, 2)}
    return [join(optimiser, values, save(server(optimiser).state() | tensors))
            for optimiser in OPTIMISERS for values, tensors in ((plain, dict[str, Tensor]()), (full, more))]  # fmt: skip


def join(optimiser: str, values: Any, tensors: bytes) -> bytes:
    """Return a checkpoint as bytes: the optimiser's number, the length of the state, the state, the tensors."""
    text = json.dumps(values).encode()
    return struct.pack("<BH", OPTIMISERS.index(optimiser), len(text)) + text + tensors


def split(data: bytes) -> tuple[str, bytes, bytes]:
    """Return (optimiser, state.json, state.safetensors) of any bytes."""
    which, length = struct.unpack("<BH", data[:3].ljust(3, b"\0"))
    return OPTIMISERS[which % len(OPTIMISERS)], data[3 : 3 + length], data[3 + length :]


def damage(data: bytes, most: int, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Return a mutation of a checkpoint: of its state, of its tensors or their table, or (``mutate``) of bytes anywhere."""
    rng, (optimiser, state, tensors) = random.Random(seed), split(data)
    try:
        kind = rng.random()
        if kind < 0.3:
            return join(optimiser, _spoil(json.loads(state), rng), tensors)[:most]
        if kind < 0.6:
            return join(rng.choice(OPTIMISERS), json.loads(state), save(_others(load(tensors), rng)))[:most]
        if kind < 0.8:
            (size,) = struct.unpack("<Q", tensors[:8])
            table = json.dumps(_spoil(json.loads(tensors[8 : 8 + size]), rng)).encode()
            return join(optimiser, json.loads(state), struct.pack("<Q", len(table)) + table + tensors[8 + size :])[:most]
    except (ValueError, RecursionError, struct.error, SafetensorError):
        pass  # it was damaged before
    return mutate(data, most)


def _extremes(dtype: torch.dtype) -> tuple[float, float, float]:
    return float("nan"), float("inf"), torch.finfo(dtype).min


def _others(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Return valid tensors of which one has another name, shape, dtype or content, or is gone."""
    name = rng.choice(sorted(tensors) or ["offset"])
    one = tensors.pop(name, torch.zeros(NUMBERS))
    flat = one.reshape(-1)
    changes = {
        "gone": {},
        "renamed": {rng.choice(("offset", "variate", "optimizer.step", "optimizer.momentum_buffer", "optimizer.")): one},
        "longer": {name: torch.cat([flat, flat])},
        "shorter": {name: flat[1:]},
        "scalar": {name: flat.sum()},
        "flat": {name: one.unsqueeze(0)},
        "typed": {name: one.to(rng.choice((torch.float64, torch.bfloat16, torch.int32, torch.bool)))},
        "strange": {name: torch.full_like(one, rng.choice(_extremes(one.dtype))) if one.is_floating_point() else one},
    }
    return {key: tensor.contiguous().clone() for key, tensor in {**tensors, **changes[rng.choice(sorted(changes))]}.items()}


def _spoil(tree: Any, rng: random.Random) -> Any:
    """Change, add or drop one thing somewhere in a tree of plain values."""
    if isinstance(tree, dict) and tree and rng.random() < 0.9:
        name = rng.choice(sorted(tree))
        what = rng.random()
        if what < 0.15:
            return {key: value for key, value in tree.items() if key != name}
        if what < 0.3:
            return tree | {rng.choice(("extra", "optimizer.step", "optimizer.exp_avg", "offset")): tree[name]}
        return tree | {name: _spoil(tree[name], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        at = rng.randrange(len(tree))
        return [*tree[:at], _spoil(tree[at], rng), *tree[at + 1 :]]
    if type(tree) is int and rng.random() < 0.5:
        return tree + rng.choice((-4, -1, 1, 4))
    return rng.choice(ODD)
