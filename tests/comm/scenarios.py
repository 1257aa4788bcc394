"""What every communicator must do, written once: each scenario takes a ``Communicator`` and a folder that all ranks share, and asserts.

``HEALTHY`` ones are played one after the other in one world of any size. ``BROKEN`` ones end their world with a ``RunError``, whose text
the results then hold. All are played by a ``Communicator`` with the bucket and the limit below.
"""

import json
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slora_dist.comm.base import Communicator
from slora_dist.errors import RunError

BUCKET = 4096
MAX_MESSAGE = 1 << 20
EXIT_CODE = 7
LARGE = 40 * BUCKET + 17  # does not fit into any transport's eager buffers together with its neighbours


def content(index: int, nbytes: int) -> Tensor:
    """Bytes that tell their message and their place."""
    return ((torch.arange(nbytes) * 31 + index * 17 + 5) % 251).to(torch.uint8)


def gathered(comm: Communicator, sizes: Sequence[int], senders: Sequence[int], nbytes: int | None) -> None:
    """Send messages of ``sizes`` and check on rank 0 that each arrives whole, once, in order and in chunks of the bucket's size."""
    own = (content(index, size) for index, (size, sender) in enumerate(zip(sizes, senders, strict=True)) if sender == comm.rank)
    expected = [
        (index, offset, min(BUCKET, size - offset)) for index, size in enumerate(sizes) for offset in range(0, max(size, 1), BUCKET)
    ]
    seen = []
    for index, offset, chunk_b in comm.gather(own, senders, nbytes):
        assert chunk_b.device.type == "cpu"
        assert torch.equal(chunk_b, content(index, sizes[index])[offset : offset + BUCKET]), (index, offset)
        seen.append((index, offset, chunk_b.numel()))
    assert seen == (expected if comm.rank == 0 else [])


def broadcast(comm: Communicator, folder: Path) -> None:
    for nbytes in (0, 1, 63, BUCKET, 10 * BUCKET + 5):
        wire_B = content(3, nbytes) if comm.rank == 0 else torch.zeros(nbytes, dtype=torch.uint8)
        comm.broadcast(wire_B)
        assert torch.equal(wire_B, content(3, nbytes))


def gather_equal_sizes(comm: Communicator, folder: Path) -> None:
    for nbytes in (1, BUCKET - 1, BUCKET, BUCKET + 1, 7 * BUCKET + 3):
        gathered(comm, [nbytes] * comm.size, range(comm.size), nbytes)


def gather_uneven_counts(comm: Communicator, folder: Path) -> None:
    """Rank r sends r + 1 messages, rank 0 the last one."""
    senders = [rank for rank in reversed(range(comm.size)) for _ in range(rank + 1)]
    gathered(comm, [2 * BUCKET + 1] * len(senders), senders, 2 * BUCKET + 1)


def gather_workers_only(comm: Communicator, folder: Path) -> None:
    senders = [rank for rank in range(1, comm.size) for _ in range(2)]
    gathered(comm, [LARGE] * len(senders), senders, LARGE)


def gather_nothing(comm: Communicator, folder: Path) -> None:
    gathered(comm, [], [], None)
    gathered(comm, [], [], 100)


def gather_empty_messages(comm: Communicator, folder: Path) -> None:
    senders = [index % comm.size for index in range(5)]
    gathered(comm, [0] * 5, senders, 0)
    gathered(comm, [0, 10, 0, 0, BUCKET], senders, None)


def gather_any_plan(comm: Communicator, folder: Path) -> None:
    """Random senders and sizes, sizes announced."""
    for seed in range(5):
        draw = random.Random(seed)
        senders = [draw.randrange(comm.size) for _ in range(20)]
        gathered(comm, [draw.choice((0, 1, 65, BUCKET, draw.randrange(4 * BUCKET))) for _ in senders], senders, None)


def gather_is_lazy_on_root(comm: Communicator, folder: Path) -> None:
    """Rank 0 hands over what it has before it makes its next own message."""
    senders = [0, comm.size - 1, 0]
    events: list[str] = []

    def made() -> Iterator[Tensor]:
        for index, sender in enumerate(senders):
            if sender == comm.rank:
                events.append(f"make {index}")
                yield content(index, 10)

    for index, _, _ in comm.gather(made(), senders, None):
        events.append(f"use {index}")
    if comm.rank == 0:
        alone = ["make 1"] if comm.size == 1 else []
        assert events == ["make 0", "use 0", *alone, "use 1", "make 2", "use 2"]


def gather_while_late(comm: Communicator, folder: Path) -> None:
    """A message arrives and is handed over while another rank has not begun with the next one."""
    if comm.size > 2:
        _late(comm, folder / "late", [2, 1])


def gather_while_making(comm: Communicator, folder: Path) -> None:
    """A message arrives and is handed over while its own sender makes the next one."""
    if comm.size > 1:
        _late(comm, folder / "making", [1, 1])


def _late(comm: Communicator, consumed: Path, senders: Sequence[int]) -> None:
    """Message 1 is made only when rank 0 has consumed message 0, which it tells by opening a pipe."""
    if comm.rank == 0:
        os.mkfifo(consumed)
    comm.barrier()

    def made() -> Iterator[Tensor]:
        for index, sender in enumerate(senders):
            if sender == comm.rank:
                if index == 1:
                    consumed.read_text()
                yield content(index, LARGE)

    for nbytes in (LARGE, None):
        for index, offset, chunk_b in comm.gather(made(), senders, nbytes):
            if index == 0 and offset + chunk_b.numel() == LARGE:
                consumed.write_text("")


def reduce_sums(comm: Communicator, folder: Path) -> None:
    """Integers exactly, floats as exactly as their sum in another order."""
    for dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        for numel in (0, 1, 1001, 50_000):
            values_W = [_values(rank, numel, dtype) for rank in range(comm.size)]
            own = values_W[comm.rank].clone()
            comm.reduce(own)
            if comm.rank == 0:
                torch.testing.assert_close(own, torch.stack(values_W).sum(0).to(dtype))


def _values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=draw, dtype=dtype)
    high = 1 << (58 if dtype == torch.int64 else 26)
    return torch.randint(-high, high, (numel,), generator=draw, dtype=dtype)


def reduce_keeps_shape(comm: Communicator, folder: Path) -> None:
    values = torch.ones(3, 5)
    comm.reduce(values)
    assert values.shape == (3, 5)
    assert comm.rank or bool((values == comm.size).all())


def reduce_refuses(comm: Communicator, folder: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.uint8):
        with pytest.raises(ValueError, match=str(dtype)):
            comm.reduce(torch.ones(4, dtype=dtype))


def knows_its_place(comm: Communicator, folder: Path) -> dict[str, Any]:
    comm.barrier()
    return {"rank": comm.rank, "size": comm.size, "name": comm.name}


def peer_killed(comm: Communicator, folder: Path) -> None:
    """The last rank dies in the middle of making its message, while rank 0 waits for it."""

    def made() -> Iterator[Tensor]:
        if comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield content(0, LARGE)

    senders = range(1, comm.size)
    for _ in comm.gather(made() if comm.rank else iter(()), senders, LARGE):
        pass
    comm.barrier()  # where the other senders learn of it


def peer_silent(comm: Communicator, folder: Path) -> None:
    """Rank 1 never sends; the world is made with a short time-out."""
    _silent(comm, folder, lambda: list(comm.gather([], [1], 10)))


def peer_silent_in_reduce(comm: Communicator, folder: Path) -> None:
    _silent(comm, folder, lambda: comm.reduce(torch.ones(1000)))


def peer_silent_in_barrier(comm: Communicator, folder: Path) -> None:
    _silent(comm, folder, comm.barrier)


def _silent(comm: Communicator, folder: Path, operation: Callable[[], object]) -> None:
    """Play ``operation`` on rank 0 alone, while the others sleep on a pipe each until it has given up."""
    pipes = silence(folder, comm.size)
    if comm.rank:
        pipes[comm.rank - 1].read_text()
        return
    try:
        operation()
    except RunError as error:
        note(comm, folder, {"error": str(error)})  # before the others go on, fail in turn and end the job
        for pipe in pipes:
            pipe.write_text("")
        raise


def silence(folder: Path, size: int) -> list[Path]:
    """The pipes that all ranks but 0 sleep on. They are there before the world is: no rank waits for another one to make them."""
    return [folder / f"silent-{rank}" for rank in range(1, size)]


def announces_too_much(comm: Communicator, folder: Path) -> None:
    for _ in comm.gather([content(0, MAX_MESSAGE + 1)] if comm.rank == 1 else [], [1], None):
        raise AssertionError("a chunk of a message that is too large")


def aborts(comm: Communicator, folder: Path) -> None:
    """Rank 1 gives up while all others wait for it."""
    if comm.rank == 1:
        comm.abort(EXIT_CODE)
    wire_B = torch.zeros(LARGE, dtype=torch.uint8)
    for _ in comm.gather([] if comm.rank != 1 else [wire_B], [1], LARGE):
        pass
    comm.barrier()


HEALTHY: dict[str, Callable[[Communicator, Path], Any]] = {
    scenario.__name__: scenario
    for scenario in (
        knows_its_place,
        broadcast,
        gather_equal_sizes,
        gather_uneven_counts,
        gather_workers_only,
        gather_nothing,
        gather_empty_messages,
        gather_any_plan,
        gather_is_lazy_on_root,
        gather_while_late,
        gather_while_making,
        reduce_sums,
        reduce_keeps_shape,
        reduce_refuses,
    )
}
BROKEN: dict[str, Callable[[Communicator, Path], Any]] = {
    scenario.__name__: scenario
    for scenario in (peer_killed, peer_silent, peer_silent_in_reduce, peer_silent_in_barrier, announces_too_much, aborts)
}


def play(comm: Communicator, names: Sequence[str], folder: Path) -> None:
    """Play the scenarios and write what comes of each into the folder; stop at the first that fails, and end as the program ends."""
    results: dict[str, Any] = {}
    try:
        for name in names:
            results[name] = (HEALTHY | BROKEN)[name](comm, folder) or "played"
        note(comm, folder, results)
        comm.close()
    except (Exception, pytest.fail.Exception) as error:
        note(comm, folder, results | {"error": str(error) if isinstance(error, RunError) else traceback.format_exc()})
        comm.abort(EXIT_CODE)


def note(comm: Communicator, folder: Path, results: dict[str, Any]) -> None:
    """Write a rank's results, whole or not at all."""
    part = folder / f"rank-{comm.rank}.part"
    part.write_text(json.dumps(results))
    part.rename(folder / f"rank-{comm.rank}.json")
