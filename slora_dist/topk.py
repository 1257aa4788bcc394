"""Top-k messages: the k largest coordinates of an update as values and positions; clients differ in which ones they send.

A body is the scales of the number format, if it has any, the values in the order of their positions, and the positions: int32, or the
gaps between them (``codec.py``), which end the message because their length is their own.

What a client does not send in a round it adds to its next update (error feedback): see ``TopK.keep``.

Legend: N coordinates, k those that are sent, B bytes.
"""

from math import ceil, log2

import torch
from torch import Tensor

from slora_dist import codec
from slora_dist.config import Indices, Values
from slora_dist.errors import ConfigError, RunError
from slora_dist.formats import FORMATS
from slora_dist.masks import largest
from slora_dist.support import Support


class TopK:
    """The codec of the ``share`` largest of a support's coordinates. With ``int32`` positions all messages have one size."""

    def __init__(self, support: Support, values: Values, indices: Indices, share: float) -> None:
        assert indices != "implicit"
        if indices == "int32" and support.numel > 1 << 31:
            raise ConfigError("comm.wire.indices", f"int32 cannot tell {support.numel} coordinates apart", "gap or gap+zstd")
        self.support, self.format, self.indices = support, FORMATS[values], indices
        self.k = max(1, round(share * support.numel))
        self.varies = "index" if indices != "int32" else None  # the kind of bytes whose number is a message's own
        self.index_bytes = _expected(support.numel, self.k, indices)
        self.scale_bytes, self.value_bytes = 4 * self.format.scales(self.k), self.format.value_bytes(self.k)
        self.nbytes = self.index_bytes + self.scale_bytes + self.value_bytes

    @property
    def most(self) -> int:
        """The bytes that no message exceeds: a code has a byte for each position and for every 255 coordinates, a zstandard frame a few."""
        return self.scale_bytes + self.value_bytes + max(4 * self.k, self.k + self.support.numel // codec.ESCAPE + 1024)

    def by_kind(self) -> dict[str, int]:
        """Return the bytes of one message by kind: index (expected ones, where sizes vary), scale, value."""
        kinds = {"index": self.index_bytes, "scale": self.scale_bytes, "value": self.value_bytes}
        return {kind: count for kind, count in kinds.items() if count}

    def encode(self, update_N: Tensor) -> Tensor:
        """Return the bytes of the largest coordinates: contiguous uint8."""
        update_N = update_N.detach().cpu()
        index_k = largest(update_N.abs(), self.k)
        if self.indices == "int32":
            code_B = index_k.int().view(torch.uint8)
        else:
            code_B = codec.encode(index_k, self.support.numel, compact=self.indices == "gap+zstd")
        return torch.cat([*self.format.encode(update_N[index_k]), code_B])

    def decode(self, wire_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (index_k, values_k) of a message: int64 positions, ascending, and float32 values.

        Raises ``RunError`` on positions that do not ascend or lie outside, on another number of them than k, on values that are not
        finite, and on what no encoder makes.
        """
        before = self.scale_bytes + self.value_bytes
        if wire_B.numel() < before:
            raise RunError(f"a message of {wire_B.numel()} bytes where {before} and positions belong")
        index_k = self._positions(wire_B[before:].contiguous())
        if len(index_k) != self.k:
            raise RunError(f"a message with {len(index_k)} positions where {self.k} belong")
        scales_S = wire_B[: self.scale_bytes].clone().view(torch.float32)
        values_k = self.format.decode(0, wire_B[self.scale_bytes : before], scales_S, self.k)[1]
        if not bool(values_k.isfinite().all()):
            raise RunError("a message with values that are not finite")
        return index_k, values_k

    def largest(self, update_N: Tensor) -> Tensor:
        """Return the update with zeros in all coordinates but the largest, which its message has."""
        index_k = largest(update_N.abs(), self.k)
        return torch.zeros_like(update_N).index_copy_(0, index_k, update_N[index_k])

    def keep(self, owed_N: Tensor, sent_N: Tensor) -> Tensor:
        """Return what is left of ``owed_N`` once the message of ``sent_N`` is sent: other coordinates, and what those sent lack of it."""
        index_k, values_k = self.decode(self.encode(sent_N))
        left_N = owed_N.detach().cpu().clone()
        left_N[index_k] -= values_k
        return left_N

    def _positions(self, code_B: Tensor) -> Tensor:
        numel = self.support.numel
        if self.indices != "int32":
            return codec.decode(code_B, numel, compact=self.indices == "gap+zstd")
        if code_B.numel() != 4 * self.k:
            raise RunError(f"a message with {code_B.numel()} bytes of positions where {4 * self.k} belong")
        index_k = code_B.clone().view(torch.int32).long()
        if int(index_k[0]) < 0 or int(index_k[-1]) >= numel or not bool((index_k.diff() > 0).all()):
            raise RunError(f"positions that do not ascend within 0 to {numel - 1}")
        return index_k


def _expected(numel: int, k: int, indices: Indices) -> int:
    """Return the bytes of k positions of ``numel``: exact for int32, else what a random choice takes, which a real one hardly exceeds."""
    if indices == "int32":
        return 4 * k
    density = k / numel
    if indices == "gap":
        far = (1 - density) ** codec.ESCAPE  # chance that a gap needs one more byte, and so on
        return min(numel, round(k * (1 + far / (1 - far)))) if far < 1 else numel
    entropy = -sum(share * log2(share) for share in (density, 1 - density) if share > 0)
    return ceil(numel * entropy / 8) + 16
