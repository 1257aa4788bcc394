"""Encryption, wrapped around any communicator: what is broadcast and gathered travels in frames sealed with AES-256-GCM.

A frame is one bucket of the transport beneath: a head of 48 bytes, the sealed payload, and its tag of 16 bytes. The head says who sends in
which life, how many frames that life has sealed before, and the size of the whole message. Everything in it, and what only the place in the
protocol tells (generation, operation, message, offset), is authenticated: a frame that was altered, cut short, sent again, or put into
another's place does not open. Every sender has a key of its own (HKDF, RFC 5869, from the session's key, its rank, and 16 random bytes of
this life), so that no pair of key and nonce comes twice, whatever is restarted. Sums on the way cannot be sealed.

Legend: B bytes of a message in the clear, S bytes sealed, b bytes of a frame.
"""

import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from slora_dist.comm.base import Chunk, Communicator, check_wire, cut
from slora_dist.errors import RunError

_HEAD = struct.Struct("<4sIQQ16s8x")  # magic, sender, frames sealed before in this life, bytes of the message, life
_PLACE = struct.Struct("<QQQQ")  # generation, operation, message, offset
_MAGIC, _TAG_BYTES = b"SLS1", 16
OVERHEAD = _HEAD.size + _TAG_BYTES  # bytes that a frame is longer than its payload


class Sealed:
    """A communicator whose messages nobody else can read or change. ``session`` is a secret key that all ranks share."""

    def __init__(self, comm: Communicator, session: bytes) -> None:
        self.comm, self.rank, self.size, self.name = comm, comm.rank, comm.size, comm.name
        self.bucket = comm.bucket - OVERHEAD  # bytes of a frame's payload
        self._session, self._life = session, secrets.token_bytes(16)
        self._keys: dict[tuple[int, bytes], AESGCM] = {}
        self._sealed = 0  # frames
        self._generation = self._operation = 0

    @property
    def members(self) -> Sequence[int]:
        """The ranks that are there, ascending."""
        return self.comm.members

    def restart(self, generation: int) -> None:
        """Count operations anew: the ranks that are left have formed process group number ``generation``."""
        self._generation, self._operation = generation, 0

    def carried(self, nbytes: int) -> int:
        """Return the bytes that travel for a message of ``nbytes``."""
        return carried(nbytes, self.bucket)

    def broadcast(self, wire_B: Tensor) -> None:
        """Overwrite ``wire_B`` by that of rank 0, which nobody between has seen."""
        check_wire(wire_B)
        self._operation += 1
        wire_S = self._seal(wire_B, 0) if self.rank == 0 else torch.empty(self.carried(wire_B.numel()), dtype=torch.uint8)
        self.comm.broadcast(wire_S)
        if self.rank:
            for offset, frame_b in cut(wire_S, self.bucket + OVERHEAD):
                start = offset // (self.bucket + OVERHEAD) * self.bucket
                part_b, total = self._open(frame_b, 0, 0, start, "broadcast")
                self._agree(total == wire_B.numel(), 0, "broadcast", f"a message of {total} bytes in place of {wire_B.numel()}")
                wire_B[start : start + part_b.numel()] = part_b

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        """Bring messages to rank 0, which opens each frame as it arrives."""
        self._operation += 1
        sealed = None if nbytes is None else self.carried(nbytes)
        own = (index for index, sender in enumerate(senders) if sender == self.rank)
        outgoing = (self._seal(self._checked(message_B, nbytes), index) for index, message_B in zip(own, messages, strict=True))
        opened: dict[int, int] = {}
        total = 0
        for index, offset, frame_b in self.comm.gather(outgoing, senders, sealed):
            start = offset // (self.bucket + OVERHEAD) * self.bucket
            if start == 0:
                self._complete(opened, total, senders)
            chunk_b, total = self._open(frame_b, senders[index], index, start, "gather")
            self._agree(nbytes in (None, total), senders[index], "gather", f"message {index} has {total} bytes in place of {nbytes}")
            opened = {index: start + chunk_b.numel()}
            yield index, start, chunk_b
        self._complete(opened, total, senders)

    def reduce(self, values: Tensor) -> None:
        """Refuse: whoever adds must see the numbers."""
        raise ValueError("a sum on the way cannot be sealed")

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.comm.barrier()

    def abort(self, code: int) -> NoReturn:
        """End all ranks."""
        self.comm.abort(code)

    def close(self) -> None:
        """Leave together."""
        self.comm.close()

    @staticmethod
    def _checked(message_B: Tensor, nbytes: int | None) -> Tensor:
        check_wire(message_B, nbytes)
        return message_B

    def _seal(self, message_B: Tensor, index: int) -> Tensor:
        message_B = message_B.cpu()
        sealed_S = torch.empty(self.carried(message_B.numel()), dtype=torch.uint8)
        for number, (start, part_b) in enumerate(cut(message_B, self.bucket)):
            frame_b = sealed_S[number * (self.bucket + OVERHEAD) :][: part_b.numel() + OVERHEAD]
            head = _HEAD.pack(_MAGIC, self.rank, self._sealed, message_B.numel(), self._life)
            frame_b[: _HEAD.size] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
            key, known = self._key(self.rank, self._life), head + self._place(index, start)
            key.encrypt_into(_nonce(self._sealed), _memory(part_b), known, _memory(frame_b[_HEAD.size :]))
            self._sealed += 1
        return sealed_S

    def _open(self, frame_b: Tensor, sender: int, index: int, start: int, op: str) -> tuple[Tensor, int]:
        """Return the payload of a frame and the bytes of its whole message; raises ``RunError`` for one that is not what it must be."""
        self._agree(frame_b.numel() >= OVERHEAD, sender, op, f"a frame of {frame_b.numel()} bytes")
        head = frame_b[: _HEAD.size].numpy().tobytes()
        magic, who, sealed, total, life = _HEAD.unpack(head)
        self._agree(magic == _MAGIC and who == sender, sender, op, "a frame of another kind or sender")
        payload_b = torch.empty(frame_b.numel() - OVERHEAD, dtype=torch.uint8)
        key, known = self._key(sender, life), head + self._place(index, start)
        try:
            key.decrypt_into(_nonce(sealed), _memory(frame_b[_HEAD.size :]), known, _memory(payload_b))
        except InvalidTag:
            which = f"frame {start // self.bucket} of message {index} of operation {self._operation}"
            self._agree(False, sender, op, f"{which} does not verify")
        return payload_b, total

    def _complete(self, opened: dict[int, int], total: int, senders: Sequence[int]) -> None:
        """Check that the message before was not cut short."""
        for index, got in opened.items():
            self._agree(got == total, senders[index], "gather", f"message {index} ends after {got} of {total} bytes")

    def _agree(self, holds: bool, peer: int, op: str, problem: str) -> None:
        if not holds:
            raise RunError(f"rank {self.rank}: {op} with rank {peer} failed: {problem}")

    def _place(self, index: int, start: int) -> bytes:
        return _PLACE.pack(self._generation, self._operation, index, start)

    def _key(self, rank: int, life: bytes) -> AESGCM:
        if (rank, life) not in self._keys:
            self._keys = {known: key for known, key in self._keys.items() if known[0] != rank}  # a rank has one life at a time
            derived = HKDF(SHA256(), 32, salt=life, info=b"slora_dist sealed" + rank.to_bytes(4, "little")).derive(self._session)
            self._keys[rank, life] = AESGCM(derived)
        return self._keys[rank, life]


def carried(nbytes: int, payload: int) -> int:
    """Return the bytes of a message of ``nbytes`` in frames of up to ``payload`` bytes each."""
    return nbytes + OVERHEAD * max(1, -(-nbytes // payload))


def _memory(bytes_b: Tensor) -> memoryview:
    return bytes_b.numpy().data


def _nonce(sealed: int) -> bytes:
    return sealed.to_bytes(12, "little")
