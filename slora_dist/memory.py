"""How the C library hands out memory: large tensors come and go in every round, and a fresh one costs more than what is done in it."""

import ctypes
import os
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep() -> None:
    """Let freed memory stay with the process, in huge pages where the kernel has them; to be called before torch allocates any.

    By default a tensor above 32 MiB is mapped anew each time, and every page of it is faulted in and cleared. C libraries other than glibc
    go on as they do.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator
    with suppress(AttributeError, OSError):
        options = ctypes.CDLL(None).mallopt
        options(_MMAP_MAX, 0)
        options(_TRIM_THRESHOLD, -1)
