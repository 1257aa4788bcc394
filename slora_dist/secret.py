"""The job's secret: 16 bytes or more that the launcher gives to every rank of one job and to nobody else, and what is proved with it.

It lies in the environment or in a file that only its owner can read; it never travels, and is never written anywhere by a rank.
"""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from slora_dist.errors import ConfigError

VARIABLE, FILE_VARIABLE = "SLORA_DIST_SECRET", "SLORA_DIST_SECRET_FILE"
SHORTEST, LONGEST = 16, 4096  # bytes
PRIVATE = "a regular file of your own with mode 0600, as `slora-dist secret FILE` makes it"


def find(environ: Mapping[str, str]) -> bytes | None:
    """Return the secret in SLORA_DIST_SECRET, else that in the file named by SLORA_DIST_SECRET_FILE; None when neither is set.

    Raises ``ConfigError`` for a file that others may read, that is another user's or no regular file, and for a secret of a wrong length.
    """
    if environ.get(VARIABLE):
        return _checked(VARIABLE, environ[VARIABLE].encode())
    if environ.get(FILE_VARIABLE):
        return _checked(FILE_VARIABLE, _read_private(environ[FILE_VARIABLE]))
    return None


def proof(secret: bytes, *parts: bytes) -> bytes:
    """Return HMAC-SHA256 (RFC 2104) with ``secret`` over ``parts``, each behind its length: no two sequences of parts look alike."""
    whole = hmac.new(secret, digestmod=hashlib.sha256)
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()


def holds(claimed: bytes, secret: bytes, *parts: bytes) -> bool:
    """Whether ``claimed`` is ``proof(secret, *parts)``, in a time that tells nothing."""
    return hmac.compare_digest(claimed, proof(secret, *parts))


def write(path: Path) -> None:
    """Make a file with a fresh secret that only the user can read. Raises ``ConfigError`` when it is there already or cannot be made."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be made ({error.strerror})", "a new file in a folder that you may write to") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")


def _read_private(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not hold the job up
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ConfigError(FILE_VARIABLE, f"{path} is no regular file", PRIVATE)
            if about.st_uid != os.geteuid():
                raise ConfigError(FILE_VARIABLE, f"{path} belongs to another user", PRIVATE)
            if about.st_mode & 0o177:
                raise ConfigError(FILE_VARIABLE, f"{path} has mode {stat.S_IMODE(about.st_mode):04o}", PRIVATE)
            return file.read(LONGEST + 1)
    except OSError as error:
        raise ConfigError(FILE_VARIABLE, f"{path} cannot be read ({error.strerror})", PRIVATE) from None


def _checked(name: str, text: bytes) -> bytes:
    """Return the secret without the white space around it; ``bytes`` of hex or any other text are the key as they stand."""
    secret = text.strip()
    if not SHORTEST <= len(secret) <= LONGEST:
        raise ConfigError(name, f"a secret of {len(secret)} bytes", f"{SHORTEST} to {LONGEST} bytes; `slora-dist secret FILE` makes 64")
    return secret
