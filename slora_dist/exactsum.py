"""How updates reach rank 0 as integers whose sum is exact (``comm.sum: exact``), masked on the way with ``comm.secure``.

Three steps: all clients train, and tell the largest magnitude of their updates; rank 0 tells the scale; the integers travel, gathered
one by one or summed on the way, with the same bits in the end. With masks the clients' public keys pass through rank 0 before.

Legend: N coordinates.
"""

import struct
import time
from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from slora_dist import fixed
from slora_dist.agreement import tell
from slora_dist.comm.metered import Metered
from slora_dist.errors import RunError
from slora_dist.fixed import SCALE_BYTES, Fixed
from slora_dist.ledger import Label
from slora_dist.secure import KEY_BYTES, Masker
from slora_dist.upload import Received, Updates, Upload, left_out
from slora_dist.wire import HEADER_BYTES, Body, Header, as_bytes, frame


def exact(comm: Metered, upload: Upload, updates: Updates, collective: str, secure: bool) -> Received | None:
    """Bring the sum of all updates to rank 0, exactly, by ``gather`` or ``reduce``. Returns None on other ranks.

    Raises ``RunError`` naming a client whose update is not finite. With ``secure`` rank 0 learns each client's header and largest
    magnitude, and of the updates only their sum; a client that is missing breaks the collective, and whoever calls again with those who
    are there has them mask anew, with new keys.
    """
    wire = upload.wire
    assert isinstance(wire, Fixed)
    if secure and len(upload.expected) < 2:
        raise RunError("one client is left in the round: alone it has nobody to mask its update with")
    trained = list(updates)
    exponent = _agree(comm, upload, [fixed.magnitude(delta_N, upload.weight(header)) for header, delta_N in trained], wire)
    messages = [(header, wire.integers(delta_N, upload.weight(header), exponent)) for header, delta_N in trained]
    if secure:
        messages = _masked(comm, upload, messages)
    headers, sum_N, spent = (_reduce if collective == "reduce" else _gather)(comm, upload, wire, messages)
    if comm.rank:
        return None
    weight = upload.total(headers)
    return Received(headers, fixed.mean(sum_N, weight, exponent), weight, spent, left_out=left_out(headers))


def _agree(comm: Metered, upload: Upload, own: Sequence[float], wire: Fixed) -> int:
    """Return the exponent of the scale on all ranks; ``own`` are the magnitudes of this rank's clients."""
    label = _control(upload, "scale", SCALE_BYTES)
    packed = (as_bytes(struct.pack("<d", magnitude)) for magnitude in own)
    found = [struct.unpack("<d", chunk_b.numpy().tobytes())[0] for _, _, chunk_b in comm.gather(packed, upload.ranks, label, SCALE_BYTES)]
    for magnitude, header in zip(found, upload.expected, strict=False):
        if not (isfinite(magnitude) and magnitude >= 0):
            raise RunError(f"client {header.client}: the largest magnitude of its update is {magnitude}")
    (exponent,) = tell(comm, [fixed.exponent(found, wire.bits) if found else 0], label)
    return exponent


def _masked(comm: Metered, upload: Upload, messages: Sequence[tuple[Header, Tensor]]) -> list[tuple[Header, Tensor]]:
    """Exchange the public keys of the round's clients, and mask this rank's integers."""
    context = f"{upload.label.phase},{upload.label.round}".encode()
    maskers = [Masker(header.client, context) for header, _ in messages]
    label = _control(upload, "key", KEY_BYTES)
    keys_B = torch.zeros(len(upload.expected) * KEY_BYTES, dtype=torch.uint8)
    for at, _, key_B in comm.gather((as_bytes(masker.public) for masker in maskers), upload.ranks, label, KEY_BYTES):
        keys_B[at * KEY_BYTES : (at + 1) * KEY_BYTES] = key_B
    comm.broadcast(keys_B, _control(upload, "key", keys_B.numel()), clients=len(messages))
    keys = keys_B.numpy().tobytes()
    public = {header.client: keys[at * KEY_BYTES : (at + 1) * KEY_BYTES] for at, header in enumerate(upload.expected)}
    return [(header, masker.mask(integers_N, public)) for masker, (header, integers_N) in zip(maskers, messages, strict=True)]


Summed = tuple[list[Header], Tensor, float]  # rank 0's headers, the sum, the seconds spent on adding


def _gather(comm: Metered, upload: Upload, wire: Fixed, messages: Sequence[tuple[Header, Tensor]]) -> Summed:
    headers, sum_N, spent = list[Header](), torch.zeros(wire.support.numel, dtype=wire.dtype), 0.0
    packed = (frame(header, integers_N.view(torch.uint8)) for header, integers_N in messages)
    for message, offset, chunk_b in comm.gather(packed, upload.ranks, upload.label, HEADER_BYTES + wire.nbytes, header=True):
        began = time.perf_counter()
        if offset == 0:
            headers.append(Header.unpack(chunk_b[:HEADER_BYTES], upload.expected[message]))
            chunk_b, offset, body = chunk_b[HEADER_BYTES:], HEADER_BYTES, Body(headers[-1])
        body.take(chunk_b)
        place, integers_n = wire.chunk(offset - HEADER_BYTES, chunk_b)
        sum_N[place] += integers_n
        spent += time.perf_counter() - began
    return headers, sum_N, spent


def _reduce(comm: Metered, upload: Upload, wire: Fixed, messages: Sequence[tuple[Header, Tensor]]) -> Summed:
    sum_N = torch.zeros(wire.support.numel, dtype=wire.dtype)
    for _, integers_N in messages:
        sum_N += integers_N
    comm.reduce(sum_N, upload.label, clients=len(messages))
    label = _control(upload, "header", HEADER_BYTES)
    packed = comm.gather((header.pack() for header, _ in messages), upload.ranks, label, HEADER_BYTES)
    return [Header.unpack(chunk_b, upload.expected[message]) for message, _, chunk_b in packed], sum_N, 0.0


def _control(upload: Upload, kind: str, nbytes: int) -> Label:
    return Label(upload.label.phase, upload.label.round, "control", {kind: nbytes})
