"""Files that are there for good, or that are named: what cannot be written is a ``RunError``, and what is, is on the disk.

``replace`` leaves the old file or the new one, whenever the process or the machine stops.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slora_dist.errors import RunError


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file when the disk is full or failing; the last checkpoint is untouched then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise RunError(f"{path} cannot be written ({cause}); --resume goes on from the last checkpoint") from error
