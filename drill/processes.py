"""What drills and the tests' clusters need of the operating system: commands with a deadline, and who is still alive."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


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
