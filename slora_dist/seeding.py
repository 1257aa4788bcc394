"""Every random choice of a run is drawn from (seed, what it is for), never from a state that was left behind by something else.

So a rank can play any client, in any order, on any number of ranks, after any resume, and draw the same numbers.
"""

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for ``purpose`` under the run's ``seed``, the same on every machine and every Python."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
