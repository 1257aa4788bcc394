"""Secure aggregation: masks that hide every client's integers from rank 0 and cancel in the sum (after Bonawitz et al. 2017).

Each pair of a round's clients agrees on a key (X25519 with keys made for this round, HKDF-SHA256), and stretches it by ChaCha20 into one
integer for each coordinate. The client with the smaller number adds them, the other one subtracts them, modulo 2^bits. What a client
sends is uniform to whoever lacks its private key; the sum over all clients of the round is the plain one, bit for bit, and any smaller
sum is noise.

A round is all or nothing: there are no shares from which a missing client's masks could be rebuilt. Whoever plays the round again makes
new keys, and masks among those who are there now.

Legend: N coordinates, B bytes.
"""

from collections.abc import Mapping

import torch
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from slora_dist.errors import RunError

KEY_BYTES = 32


class Masker:
    """One client's part in one round. The private key is made here, from the system's randomness, and never leaves."""

    def __init__(self, client: int, context: bytes) -> None:
        self.client, self._context = client, context
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def mask(self, integers_N: Tensor, public: Mapping[int, bytes]) -> Tensor:
        """Return the integers (int32 or int64) with the masks of all pairs; ``public`` holds the keys of the round's clients.

        Raises ``RunError`` when the own key is not among them as it was sent, when two are alike, or one is no key.
        """
        if public.get(self.client) != self.public or len(set(public.values())) < len(public):
            raise RunError(f"client {self.client}: the keys of the round are not those that its clients sent")
        masked_N = integers_N.clone()
        for peer, key in public.items():
            if peer != self.client:
                stretch_N = _stretch(self._shared(peer, key), integers_N)
                masked_N.add_(stretch_N, alpha=1 if self.client < peer else -1)  # integers of a fixed width wrap around: modulo 2^bits
        return masked_N

    def _shared(self, peer: int, key: bytes) -> bytes:
        """Return the 32 bytes that only this client and ``peer`` can work out."""
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(key))
        except (ValueError, InvalidKey):
            raise RunError(f"client {self.client}: what came as the key of client {peer} is none") from None
        pair = f"{min(self.client, peer)},{max(self.client, peer)}".encode()
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=b"slora_dist mask|" + self._context + b"|" + pair).derive(secret)


def stream(key: bytes, nbytes: int) -> bytearray:
    """Return ``nbytes`` of ChaCha20's key stream; ``key`` (32 bytes) must be of one use."""
    return bytearray(Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(nbytes)))


def _stretch(key: bytes, like_N: Tensor) -> Tensor:
    return torch.frombuffer(stream(key, like_N.numel() * like_N.element_size()), dtype=like_N.dtype)
