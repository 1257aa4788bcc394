"""What harm is made of: an object that would run a command if anybody unpickled it, and trees of settings or notes with garbage in them."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

Rng = random.Random


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return explode, ("unpickled",)


def explode(how: str) -> None:
    raise AssertionError(how)


JSON_GARBAGE: tuple[Any, ...] = (None, -1.5, math.nan, -math.inf, "", "nan", "ж" * 50, [], [[1]], ["a", {}], {}, {"a": 1}, 10**400)
GARBAGE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 1e400, -math.inf, math.nan, "", "nan", "1e-3x", "\x00", "ж" * 50, [], [1], ["a", {}], {}, {"a": 1}, {1: 2},
    10**40, "comm.wire", b"bytes", [[[[]]]], {"kind": "sparse"}, [{"kind": "no"}], "2026-01-01",
)  # fmt: skip


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(path for key, value in below for path in paths(value, (*at, key)))]


def spoilt(tree: Any, rng: Rng, garbage: Sequence[Any] = GARBAGE) -> Any:
    """Return the tree with garbage at one to three places: in place of a value, or under a name that nobody knows."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *parents, last = rng.choice(paths(tree)[1:])
        node = tree
        for part in parents:
            node = node[part]
        node[last if rng.random() < 0.8 or isinstance(node, list) else rng.choice(("nobody", "", "kind", 7))] = copy.deepcopy(
            rng.choice(garbage)
        )
    return tree
