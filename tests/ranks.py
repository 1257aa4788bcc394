"""Run a function on several ranks: processes forked from one parent that has imported torch and done nothing else, with a time limit.

The parent is multiprocessing's fork server, not pytest's process: that one may have started OpenMP or autograd threads, which a fork loses.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["torch", "torch.distributed"])


@dataclass(frozen=True)
class Ended:
    """How a rank ended: what its function returned, or the traceback as text, or neither when the process died."""

    value: Any
    error: str | None
    exitcode: int | None


def run_ranks(size: int, function: Callable[..., Any], *args: Any, seconds: float = 60.0) -> list[Any]:
    """Return ``function(rank, size, *args)`` of every rank; fail with all tracebacks if one raises, dies or exceeds ``seconds``."""
    ended = end_ranks(size, function, *args, seconds=seconds)
    failures = [f"rank {rank}: {end.error or f'exit code {end.exitcode}'}" for rank, end in enumerate(ended) if end.error or end.exitcode]
    assert not failures, "\n".join(failures)
    return [end.value for end in ended]


def end_ranks(size: int, function: Callable[..., Any], *args: Any, seconds: float = 60.0) -> list[Ended]:
    """Do the same where ranks are meant to fail: return how each has ended. ``function`` is a module's own, so that it can be pickled."""
    deadline = time.monotonic() + seconds
    pipes = [_FORK.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _FORK.Process(target=_play, args=(writer, function, rank, size, args), daemon=True) for rank, (_, writer) in enumerate(pipes)
    ]
    with _killed(processes):
        for process, (_, writer) in zip(processes, pipes, strict=True):
            process.start()
            writer.close()
        return [_end(process, reader, deadline) for process, (reader, _) in zip(processes, pipes, strict=True)]


def _play(writer: Connection, function: Callable[..., Any], rank: int, size: int, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        writer.send((function(rank, size, *args), None))
    except BaseException:
        writer.send((None, traceback.format_exc()))


def _end(process: BaseProcess, reader: Connection, deadline: float) -> Ended:
    if not reader.poll(max(deadline - time.monotonic(), 0)):
        raise AssertionError(f"{process.name} is still running at the time limit")
    try:
        value, error = reader.recv()
    except EOFError:
        value, error = None, None
    process.join(max(deadline - time.monotonic(), 0.1))
    return Ended(value, error, process.exitcode)


@contextmanager
def _killed(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Leave no process behind, whatever happens inside."""
    try:
        yield
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
