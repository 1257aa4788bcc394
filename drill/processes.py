"""What drills and tests need of the operating system: commands with a deadline, waiting for a condition, and who is still alive."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

INTERVAL = 0.1  # seconds between two looks at a condition


def until(condition: Callable[[], bool], what: str, timeout: float = 60, interval: float = INTERVAL) -> None:
    """Return as soon as ``condition`` holds; raises ``TimeoutError`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(interval)


def output(command: Sequence[str | Path], timeout: float = 60, **options: object) -> str:
    """Run a command to its end and return what it printed; a failure shows both streams."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    text: str = result.stdout
    return text


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
