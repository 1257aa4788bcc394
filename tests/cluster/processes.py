"""What tests of clusters need of the operating system: whose processes run."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from drill.processes import alive


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
