"""Ranks that cannot go on together any more give up, and say so."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slora_dist.comm.alone import Alone
from slora_dist.errors import ConfigError, RunError, TransportError
from slora_dist.job import Job
from slora_dist.rounds import phases
from slora_dist.rounds.healing import BREAKS, heal
from slora_dist.runfolder import Checkpoint
from tests.tiny import tiny

DONE = 3  # rounds


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


class Formed(Group):
    """A group that is formed at once, without those who are in ``dying``."""

    def __init__(self) -> None:
        super().__init__()
        self.members, self.dying = [0, 1, 2, 3], list[int]()

    def regroup(self) -> None:
        for rank in self.dying:
            self.members.remove(rank)
            self.generations.losses.append(SimpleNamespace(rank=rank, reason="its connection closed"))
        self.dying = []


def seat_of(group: Any) -> Any:
    """Rank 0 in round 4, as far as healing looks at it."""
    config = tiny("clients.min_clients=2", "clients.count=3", "clients.per_round=3")
    done = Checkpoint({}, {"round": DONE, "unjudged": None})
    folder = SimpleNamespace(wait=lambda: None, latest=lambda: done, rewind=lambda *_: None)
    comm = SimpleNamespace(size=4, members=group.members, ledger=SimpleNamespace(break_off=lambda: None))
    where = SimpleNamespace(round=DONE + 1, operation="upload")
    seat = SimpleNamespace(group=group, where=where, is_root=True, sealed=None, comm=comm, folder=folder, config=config, lost=[])
    return SimpleNamespace(**vars(seat), breaks=Counter(), phases=config.method.resolved(), start_over=lambda: None)


def test_who_lives_but_cannot_reach_another_ends_the_run() -> None:
    """Two workers that reach rank 0 alone: no try brings them together, and nobody is lost."""
    group: Any = Group()
    seat: Any = SimpleNamespace(group=group, where=SimpleNamespace(round=3, operation="upload"), is_root=True)
    with pytest.raises(RunError, match=r"4 groups in a row were not formed, and nobody is gone: .*Connection refused") as found:
        heal(seat, TransportError("broken"))
    assert not isinstance(found.value, TransportError) and group.tries == 1 + group.size


def test_a_round_that_breaks_again_and_again_with_nobody_gone_ends_the_run() -> None:
    """A death is a reason to try as often anew, and so is a round that was finished."""
    group = Formed()
    seat = seat_of(group)
    for _ in range(BREAKS):
        heal(seat, TransportError("rank 0: gather with rank 2 failed: Connection reset by peer"))
    group.dying = [3]
    for _ in range(BREAKS):
        heal(seat, TransportError("rank 0: gather with rank 2 failed: Connection reset by peer"))
    assert [lost["rank"] for lost in seat.lost] == [3]
    with pytest.raises(RunError, match=rf"round {DONE + 1} has broken {BREAKS + 1} times, .*comm\.timeout.*rank 2 failed") as found:
        heal(seat, TransportError("rank 0: gather with rank 2 failed: Connection reset by peer"))
    assert not isinstance(found.value, TransportError) and seat.where.operation == "upload", "what broke is named, not the cure"


def test_who_goes_when_all_rounds_are_played_does_not_end_the_run() -> None:
    """With two of three clients gone the next round could not be played."""
    group = Formed()
    seat = seat_of(group)
    group.dying = [2, 3]
    with pytest.raises(RunError, match=r"1 clients are left, clients\.min_clients is 2"):
        heal(seat, TransportError("broken"))
    seat.phases = [SimpleNamespace(rounds=DONE)]
    assert heal(seat, TransportError("broken")) is not None


@pytest.mark.parametrize(("joined", "kind"), [(True, TransportError), (False, RunError)])
def test_a_rank_that_has_joined_and_means_other_coordinates_does_not_end_the_run(
    joined: bool, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on without it; one that was there from the start has had its say in what all have done."""
    refused: dict[int, ConfigError] = {}

    def refuse(rank: int, error: ConfigError) -> bool:
        refused[rank] = error
        return joined

    monkeypatch.setattr(phases, "gather_bytes", lambda _, mine, __: {0: mine, 1: mine, 2: b"other"})
    monkeypatch.setattr(phases.methods, "base_weights", lambda *_: {})
    seat: Any = SimpleNamespace(classifier=None, comm=None, group=SimpleNamespace(generations=SimpleNamespace(refuse=refuse)))
    coordinates = SimpleNamespace(fingerprint=lambda _: b"mine")
    stage: Any = SimpleNamespace(name="sparse", found={}, reference_N=torch.zeros(1), coordinates=coordinates, label=lambda *_: None)
    with pytest.raises(RunError, match="rank 2 has other weights or another mask in phase sparse") as found:
        phases._compare_fingerprints(seat, stage, 3)
    assert type(found.value) is kind and list(refused) == [2]


@pytest.mark.parametrize(("size", "kind"), [(1, ConfigError), (2, RunError)])
def test_a_file_that_cannot_be_read_under_way_ends_all_ranks(size: int, kind: type[Exception], tmp_path: Path) -> None:
    """A ``ConfigError`` is what all ranks have agreed on: with that a rank would leave together with others, who know nothing of it."""

    def play(*_: object) -> Iterator[dict[str, Any]]:
        yield {}
        raise ConfigError("--resume", "state.json cannot be read", "another")

    job: Any = Job(tiny(), Alone(), tmp_path / "run", torch.device("cpu"))
    job.comm.size = size
    job.prepare = lambda *_: SimpleNamespace(is_root=False, rounds=2, play=play)
    with pytest.raises(kind, match=r"--resume: state\.json cannot be read"):
        job.run(False, None)
