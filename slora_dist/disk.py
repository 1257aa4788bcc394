"""Files that are there for good, or that are named: what cannot be written is a ``RunError``, and what is, is on the disk.

``replace`` leaves the old file or the new one, whenever the process or the machine stops.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slora_dist.errors import ConfigError, RunError


def replace(path: Path, text: str) -> None:
    """Write a file anew in one step."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path: Path) -> None:
    """Raise ``ConfigError`` when ``--out`` names a file that cannot be written, before there is anything to write."""
    problem = None
    if path.is_dir():
        problem = "is a folder"
    elif not path.absolute().parent.is_dir():
        problem = "lies in no folder"
    elif not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        problem = "cannot be written (Permission denied)"
    if problem:
        raise ConfigError("--out", f"{path} {problem}", "a file in a folder that you may write to")


def write(path: Path, text: str) -> None:
    """Write the file that ``--out`` names. Raises ``ConfigError`` when it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", f"{path} cannot be written ({error.strerror})", "a file in a folder that you may write to") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file when the disk is full or failing; the last checkpoint is untouched then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise RunError(f"{path} cannot be written ({cause}); --resume goes on from the last checkpoint") from error
