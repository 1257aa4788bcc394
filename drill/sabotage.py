"""What is done to a rank from inside, at a given point of a given round. Each returns a saboteur for ``ranks.Ranks``.

The points of a round, in order: ``broadcast`` (before the model comes), ``training`` (before it), ``trained`` (after it), ``upload`` (while
the message is made), ``ledger`` (while the notes are taken), and on rank 0 ``evaluate`` and ``checkpoint``.
"""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drill.ranks import Saboteur, pids

POINTS = ("broadcast", "training", "trained", "upload", "ledger")
ROOT_POINTS = ("broadcast", "evaluate", "ledger", "checkpoint")
Deed = Callable[[], None]


def at(point: str, number: int, deed: Deed, mark: Path) -> Saboteur:
    """Do ``deed`` once, at a point of round ``number``; leave the time (monotonic) in ``mark`` just before."""

    def saboteur() -> None:
        from slora_dist.rounds import session

        done: list[bool] = []
        play = session.Session._round

        def strike() -> None:
            if not done and here and here[0] >= number:  # a checkpoint may be written behind the next round
                done.append(True)
                _note(mark)
                deed()

        here: list[int] = []

        def played(self: Any, stage: Any, this: int) -> Any:
            here[:] = [this]
            if point == "broadcast":
                strike()
            return play(self, stage, this)

        session.Session._round = played  # type: ignore[method-assign]
        if point != "broadcast":
            owner, name, before = _place(point)
            _wrap(owner, name, strike, before)

    return saboteur


def _place(point: str) -> tuple[Any, str, bool]:
    """Return owner and name of the function at a point, and whether to strike before it."""
    from slora_dist import client
    from slora_dist.journal import Journal
    from slora_dist.rounds.seat import Seat
    from slora_dist.runfolder import RunFolder
    from slora_dist.wire import Header

    return {
        "training": (client, "train", True),
        "trained": (client, "train", False),
        "upload": (Header, "pack", True),
        "ledger": (Journal, "take", True),
        "evaluate": (Seat, "evaluate", True),
        "checkpoint": (RunFolder, "save", True),
    }[point]


def _wrap(owner: Any, name: str, strike: Deed, before: bool) -> None:
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            strike()
        result = inner(*args, **kwargs)
        if not before:
            strike()
        return result

    setattr(owner, name, wrapped)


def kill() -> None:
    """Die without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stand still."""
    os.kill(os.getpid(), signal.SIGSTOP)


def dawdle() -> None:
    """Be late."""
    time.sleep(1.5)


def drop_links() -> None:
    """Lose every connection at once, as when a cable is pulled."""
    from slora_dist.comm.sever import sever, sockets

    sever(set(sockets()), set())


def end() -> None:
    """Be told to go, as by SLURM before a requeue."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # the process leaves meanwhile


def another_snapshot() -> None:
    """Load other weights than the others have."""
    from slora_dist import model

    load = model.load

    def loaded(*args: Any) -> model.TaskModel:
        found = load(*args)
        with torch.no_grad():
            next(found.net.parameters()).mul_(2.0)
        return found

    model.load = loaded


def end_all(folder: Path) -> None:
    """Be told to go, and all other ranks at the same moment; ``folder`` has the number of each one's process."""
    for pid in pids(folder).values():
        os.kill(pid, signal.SIGTERM)
    time.sleep(60)


def fill_disk() -> None:
    """Have no room left for a checkpoint."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tear_checkpoint() -> None:
    """Find the disk full in the middle of the next file that is written."""
    from slora_dist import runfolder

    def torn(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half a file")
        fill_disk()

    runfolder.save_file = torn  # type: ignore[assignment]


def hurry(seconds: float) -> Saboteur:
    """Wait no longer than ``seconds`` in an operation of a round. (``comm.timeout`` holds for the start, too, which takes longer here.)"""

    def saboteur() -> None:
        from slora_dist.rounds import session

        play = session.Session._round

        def played(self: Any, stage: Any, this: int) -> Any:
            self.comm.comm.timeout = seconds
            return play(self, stage, this)

        session.Session._round = played  # type: ignore[method-assign]

    return saboteur


def nan_update(client: int, number: int, mark: Path) -> Saboteur:
    """Let a client's update of round ``number`` be NaN, on whichever rank it trains."""

    def saboteur() -> None:
        from dataclasses import replace

        from slora_dist import client as clients
        from slora_dist.rounds import training

        here: list[int] = []
        begin, train = training._train, clients.train

        def begun(seat: Any, stage: Any, this: int, who: int, *more: Any) -> Any:
            here[:] = [who, this]
            return begin(seat, stage, this, who, *more)

        def trained(*args: Any, **kwargs: Any) -> Any:
            update = train(*args, **kwargs)
            if here != [client, number]:
                return update
            _note(mark)
            return replace(update, delta_N=torch.full_like(update.delta_N, float("nan")))

        training._train, clients.train = begun, trained  # type: ignore[assignment]

    return saboteur


def corrupt_frame(client: int, number: int, mark: Path) -> Saboteur:
    """Damage the header of a client's message of round ``number``, on whichever rank it trains."""

    def saboteur() -> None:
        from slora_dist.wire import Header

        pack = Header.pack

        def damaged(self: Header) -> torch.Tensor:
            header_B = pack(self)
            if (self.client, self.round) == (client, number):
                _note(mark)
                header_B[0] ^= 0xFF
            return header_B

        Header.pack = damaged  # type: ignore[method-assign]

    return saboteur


def _note(mark: Path) -> None:
    """Leave the time of the fault, complete as soon as it can be seen."""
    draft = mark.with_suffix(".draft")
    draft.write_text(str(time.monotonic()), encoding="utf-8")
    draft.rename(mark)
