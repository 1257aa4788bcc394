"""One connection of the lifeline: how two ranks make sure of each other, and the frames that they then exchange.

Both ends prove that they hold the job's secret by an HMAC over the other's nonce. Every frame after that carries an HMAC under a key of
this connection and its own number, so that nobody on the way can forge, repeat or leave out one. Without a secret the same is done under an
empty one: it then guards against accidents only.

A rank that joins a run under way tells its version and settings with its proof. Rank 0's proof covers its answer: why the rank is refused,
or the key of the run's session, sealed with AES-256-GCM under a key from the secret and both nonces.
"""

import hmac
import json
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from math import ceil, inf

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from slora_dist.errors import ConfigError, RunError
from slora_dist.secret import holds, proof

NONCE = 32  # bytes of a nonce and of a proof
HANDSHAKE_SECONDS = 20.0  # that the other side may take for one step of the handshake, and three times as long for all of it
FRAME_SECONDS = 10.0  # that a frame may take once its first byte is here
LISTEN = 0.5  # seconds of listening at a time
MAX_BODY = 1 << 20
MAX_ACCOUNT = 64 << 10  # bytes that a rank may tell of itself, before rank 0 knows it

Judge = Callable[[int, bool, bytes], bytes | ConfigError]

_HELLO = struct.Struct("<IBI")  # rank, whether it joins a run that is under way, bytes of its account
_ANSWER = struct.Struct("<BI")  # whether the rank is refused, bytes of the reason or of the sealed session key
_ONCE = bytes(12)  # the nonce of a cipher that seals one message
_HEAD = struct.Struct("<BI")  # kind, bytes of the body
_MAC = 16


class Line:
    """An authenticated connection. ``send`` may be called from several threads, ``receive`` from one."""

    def __init__(self, connection: socket.socket, key: bytes, side: bytes, other: bytes) -> None:
        self.socket, self._key, self._side, self._other = connection, key, side, other
        self._sent = self._received = 0
        self._lock = threading.Lock()

    def send(self, kind: int, body: bytes = b"") -> None:
        """Send a frame; raises ``OSError`` when the other end is gone."""
        with self._lock:
            mac = self._mac(self._side, self._sent, kind, body)
            self._sent += 1
            self.socket.sendall(_HEAD.pack(kind, len(body)) + body + mac)

    def receive(self) -> tuple[int, bytes]:
        """Return the next frame; raises ``OSError`` when the other end is gone, ``RunError`` on a frame that it did not send."""
        kind, size = _HEAD.unpack(take(self.socket, _HEAD.size))
        if size > MAX_BODY:
            raise RunError(f"a frame of {size} bytes on the lifeline, allowed are {MAX_BODY}")
        body, mac = take(self.socket, size), take(self.socket, _MAC)
        if not hmac.compare_digest(mac, self._mac(self._other, self._received, kind, body)):
            raise RunError("a frame on the lifeline that the other end did not send")
        self._received += 1
        return kind, body

    def close(self) -> None:
        """Close it; whoever waits at the other end learns of it."""
        self.socket.close()

    def _mac(self, side: bytes, number: int, kind: int, body: bytes) -> bytes:
        return proof(self._key, side, number.to_bytes(8, "little"), bytes([kind]), body)[:_MAC]


def await_sign(connection: socket.socket, seconds: float) -> None:
    """Return when there is something to read; raises ``TimeoutError`` when this process has listened for ``seconds`` in vain.

    Time in which it stood still itself, with its whole job or machine perhaps, says nothing of the other end, which could not be heard.
    So silence is not told by a clock: it is a number of short looks, one of which may have taken as long as it likes.
    """
    look = min(LISTEN, seconds)
    watched = select.poll()
    watched.register(connection, select.POLLIN)
    for _ in range(ceil(seconds / look)):
        if watched.poll(look * 1000):
            return
    raise TimeoutError


def take(connection: socket.socket, size: int, deadline: float = inf) -> bytes:
    """Read exactly ``size`` bytes; raises ``ConnectionError`` at the end of the stream, ``TimeoutError`` after ``deadline`` (monotonic)."""
    parts = bytearray()
    while len(parts) < size:
        if time.monotonic() > deadline:
            raise TimeoutError("it takes too long to introduce itself")
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("connection closed")
        parts += part
    return bytes(parts)


def call(connection: socket.socket, secret: bytes, account: bytes, rank: int, joins: bool) -> tuple[Line, bytes]:
    """Introduce this rank to rank 0, with its ``account`` of what it runs if it joins; return its line and the run's session key.

    The key is empty where this rank does not join. Raises ``RunError`` when rank 0 does not know the secret or does not trust this
    rank, ``ConfigError`` when it says why it refuses it.
    """
    connection.settimeout(HANDSHAKE_SECONDS)
    theirs, mine = take(connection, NONCE), secrets.token_bytes(NONCE)
    hello = _HELLO.pack(rank, joins, len(account))
    connection.sendall(hello + mine + account + proof(secret, b"rank", theirs, mine, hello, account))
    try:
        proven, head = take(connection, NONCE), take(connection, _ANSWER.size)
    except ConnectionError as error:
        raise RunError(f"rank {rank}: rank 0 closed the connection: does this rank hold the job's secret? ({error})") from error
    refused, size = _ANSWER.unpack(head)
    told = take(connection, size) if size <= MAX_ACCOUNT else b""
    if not holds(proven, secret, b"root", mine, theirs, head, told):
        raise RunError("rank 0 has refused this rank, or does not hold the job's secret: see what rank 0 said")
    if refused:
        raise ConfigError(*json.loads(told))
    connection.settimeout(FRAME_SECONDS)
    line = Line(connection, proof(secret, b"line", theirs, mine), b"rank", b"root")
    return line, _wrap(secret, theirs, mine).decrypt(_ONCE, told, None) if told else b""


def answer(connection: socket.socket, secret: bytes, size: int, judge: Judge) -> tuple[Line, int, bool]:
    """Make sure of a rank that calls: (its line, its number, whether it joins). Raises ``RunError`` that says why it is refused.

    ``judge(rank, joins, account)`` returns the session key for a rank that joins (empty for one that is there from the start), or why the
    rank may not take part; who holds the secret is told.
    """
    connection.settimeout(HANDSHAKE_SECONDS)
    mine, deadline = secrets.token_bytes(NONCE), time.monotonic() + 3 * HANDSHAKE_SECONDS
    connection.sendall(mine)
    hello, theirs = take(connection, _HELLO.size, deadline), take(connection, NONCE, deadline)
    rank, joins, length = _HELLO.unpack(hello)
    if length > MAX_ACCOUNT:
        raise RunError(f"it announces {length} bytes, allowed are {MAX_ACCOUNT}")
    account, proven = take(connection, length, deadline), take(connection, NONCE, deadline)
    if not holds(proven, secret, b"rank", mine, theirs, hello, account):
        raise RunError("it does not hold the job's secret")
    if not 0 < rank < size:
        raise RunError(f"it calls itself rank {rank} of {size}")
    found = judge(rank, bool(joins), account)
    refused = isinstance(found, ConfigError)
    told = reason_of(found) if isinstance(found, ConfigError) else _wrap(secret, mine, theirs).encrypt(_ONCE, found, None) if found else b""
    head = _ANSWER.pack(refused, len(told))
    connection.sendall(proof(secret, b"root", theirs, mine, head, told) + head + told)
    if isinstance(found, ConfigError):
        raise RunError(str(found))
    connection.settimeout(FRAME_SECONDS)
    return Line(connection, proof(secret, b"line", mine, theirs), b"root", b"rank"), rank, bool(joins)


def reason_of(error: ConfigError) -> bytes:
    """Return a refusal as it travels: JSON of what the error is made of."""
    return json.dumps([error.setting, error.problem, error.allowed]).encode()


def _wrap(secret: bytes, root: bytes, rank: bytes) -> AESGCM:
    """Return the cipher in which rank 0 hands out the session's key, once: it follows from the secret and both nonces."""
    return AESGCM(proof(secret, b"session for a newcomer", root, rank))
