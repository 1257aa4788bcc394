"""What both clusters need of the operating system: commands with a deadline, waiting for a condition, and who is still alive."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

INTERVAL = 0.1  # seconds between two looks at a condition


def output(command: Sequence[str | Path], timeout: float = 60, **options: object) -> str:
    """Run a command to its end and return what it printed; a failure shows both streams."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    text: str = result.stdout
    return text


def until(condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
    """Return as soon as ``condition`` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(INTERVAL)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
