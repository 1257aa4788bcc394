"""Ranks that cannot form a group any more give up, and say so."""

from types import SimpleNamespace
from typing import Any

import pytest

from slora_dist.errors import RunError, TransportError
from slora_dist.rounds.healing import heal


class Group:
    """A group of rank 0's that is never formed again; rank 3 dies in the second of its tries."""

    rank, size = 0, 4

    def __init__(self) -> None:
        self.tries = 0
        self.generations = SimpleNamespace(losses=[])

    def regroup(self) -> None:
        self.tries += 1
        if self.tries == 2:
            self.generations.losses.append("rank 3")
        raise TransportError("rank 0: regroup failed: Connection refused")


def test_who_lives_but_cannot_reach_another_ends_the_run() -> None:
    """Two workers that reach rank 0 alone: no try brings them together, and nobody is lost."""
    group: Any = Group()
    seat: Any = SimpleNamespace(group=group, where=SimpleNamespace(round=3), is_root=True)
    with pytest.raises(RunError, match=r"4 groups in a row were not formed, and nobody is gone: .*Connection refused") as found:
        heal(seat, TransportError("broken"))
    assert not isinstance(found.value, TransportError) and group.tries == 1 + group.size
