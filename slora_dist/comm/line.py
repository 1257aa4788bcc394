"""One connection of the lifeline: how two ranks make sure of each other, and the frames that they then exchange.

Both ends prove that they hold the job's secret by an HMAC over the other's nonce. Every frame after that carries an HMAC under a key of
this connection and its own number, so that nobody on the way can forge, repeat or leave out one. Without a secret the same is done under an
empty one: it then guards against accidents only.
"""

import hmac
import secrets
import socket
import struct
import threading

from slora_dist.errors import RunError
from slora_dist.secret import holds, proof

NONCE = 32  # bytes of a nonce, of a digest and of a proof
HANDSHAKE_SECONDS = 20.0  # that the other side may take for one step of the handshake
FRAME_SECONDS = 10.0  # that a frame may take once its first byte is here
MAX_BODY = 1 << 20

_HELLO = struct.Struct("<IB")  # rank, whether it joins a run that is under way
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


def take(connection: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes; raises ``ConnectionError`` at the end of the stream."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("connection closed")
        parts += part
    return bytes(parts)


def call(connection: socket.socket, secret: bytes, digest: bytes, rank: int, joins: bool) -> Line:
    """Introduce this rank to rank 0; ``digest`` (32 bytes) stands for version and settings. Raises ``RunError`` when it is refused."""
    connection.settimeout(HANDSHAKE_SECONDS)
    theirs, mine = take(connection, NONCE), secrets.token_bytes(NONCE)
    hello = _HELLO.pack(rank, joins)
    connection.sendall(hello + digest + mine + proof(secret, b"rank", theirs, mine, hello, digest))
    answer = take(connection, NONCE)
    if not holds(answer, secret, b"root", mine, theirs):
        raise RunError("rank 0 has refused this rank, or does not hold the job's secret: see what rank 0 said")
    connection.settimeout(FRAME_SECONDS)
    return Line(connection, proof(secret, b"line", theirs, mine), b"rank", b"root")


def answer(connection: socket.socket, secret: bytes, digest: bytes, size: int) -> tuple[Line, int, bool]:
    """Make sure of a rank that calls: (its line, its number, whether it joins). Raises ``RunError`` that says why it is refused."""
    connection.settimeout(HANDSHAKE_SECONDS)
    mine = secrets.token_bytes(NONCE)
    connection.sendall(mine)
    hello, theirs_digest = take(connection, _HELLO.size), take(connection, NONCE)
    theirs, proven = take(connection, NONCE), take(connection, NONCE)
    if not holds(proven, secret, b"rank", mine, theirs, hello, theirs_digest):
        raise RunError("it does not hold the job's secret")
    rank, joins = _HELLO.unpack(hello)
    if not 0 < rank < size:
        raise RunError(f"it calls itself rank {rank} of {size}")
    if joins and theirs_digest != digest:  # who is there from the start is asked more closely: see ``admission``
        raise RunError(f"rank {rank} has another version or other settings")
    connection.sendall(proof(secret, b"root", theirs, mine))
    connection.settimeout(FRAME_SECONDS)
    return Line(connection, proof(secret, b"line", mine, theirs), b"root", b"rank"), rank, bool(joins)
