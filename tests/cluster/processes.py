"""What tests of clusters need of the operating system: waiting for a condition, and whose processes run."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from drill.processes import alive

INTERVAL = 0.1  # seconds between two looks at a condition


def until(condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
    """Return as soon as ``condition`` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(INTERVAL)


def having(variables: Mapping[str, str]) -> Iterator[int]:
    """Yield the processes that carry these environment variables."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                found = wanted <= set((folder / "environ").read_bytes().split(b"\0"))
            except OSError:  # gone meanwhile, or a kernel thread
                continue
            if found and alive(int(folder.name)):
                yield int(folder.name)


def command_line(pid: int) -> str:
    """Return a process's command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
