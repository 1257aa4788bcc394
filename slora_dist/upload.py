"""How updates reach rank 0: gathered one by one, or summed on the way.

``gather`` brings every client's message to rank 0, which adds it in client order: the same bits on any number of ranks. ``reduce`` sums a
rank's clients where they are and lets the transport add the ranks: rank 0 receives O(1) updates instead of O(K), in an order that is the
transport's own, so that the last bits of a float sum may differ.

Legend: N coordinates, b a bucket of bytes.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from slora_dist.aggregate.mean import Kept, Mean, finite
from slora_dist.agreement import tell
from slora_dist.comm.base import Chunk
from slora_dist.comm.metered import Metered
from slora_dist.errors import RunError
from slora_dist.fixed import Fixed
from slora_dist.ledger import Label
from slora_dist.support import Part
from slora_dist.topk import TopK
from slora_dist.wire import HEADER_BYTES, Body, Header, Wire, frame

Updates = Iterator[tuple[Header, Tensor]]  # of this rank's clients, made when asked for: (header, delta_N)

Collective = Literal["gather", "reduce"]

PROBE_BYTES, PROBES = 8 << 20, 3


@dataclass(frozen=True)
class Upload:
    """One round's upload: the wire, the ledger's label, what each client's header must say, and the rank that plays each client.

    With ``holds`` rank 0 keeps every update, for a rule that needs all of them at once. A client that is left out has no weight; with
    ``absent_count`` it counts as one whose update is zero: noise was measured for so many clients.
    """

    wire: Wire | TopK | Fixed
    label: Label
    expected: Sequence[Header]
    ranks: Sequence[int]
    by_examples: bool
    holds: bool = False
    absent_count: bool = False

    def weight(self, header: Header) -> float:
        """Return a client's weight in the mean."""
        if header.reason and not self.absent_count:
            return 0.0
        return float(header.num_examples) if self.by_examples else 1.0

    def total(self, headers: Sequence[Header]) -> float:
        """Return the weight of all clients; raises ``RunError`` when every one of them is left out."""
        if all(header.reason for header in headers):
            raise RunError(f"no client has an update: {headers[0].reason}")
        return sum(self.weight(header) for header in headers)


@dataclass(frozen=True)
class Received:
    """What rank 0 has after an upload: headers in client order, the mean update and the weight that it is of, the seconds spent on adding,
    and updates if kept.

    ``left_out`` are the clients without an update that is a finite number, and why; ``distrusted`` those whom a robust aggregate did not
    believe.
    """

    headers: list[Header]
    mean_N: Tensor
    weight: float
    seconds: float
    kept: Kept | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)
    distrusted: Mapping[int, str] = field(default_factory=dict)

    def sound(self) -> tuple[list[int], list[float], list[Tensor]]:
        """Return clients, weights and updates of those whose kept updates are sound; nothing where none are kept."""
        if not self.kept:
            return [], [], []
        refused = set(self.kept.refused)
        return [header.client for at, header in enumerate(self.headers) if at not in refused], *self.kept.sound()


def gather(comm: Metered, upload: Upload, updates: Updates) -> Received | None:
    """Gather every update; rank 0 adds each bucket while the next arrives. Returns None on other ranks."""
    wire, headers = upload.wire, list[Header]()
    if isinstance(wire, TopK):
        return _gather_largest(comm, upload, wire, updates)
    assert isinstance(wire, Wire)
    messages = (frame(header, wire.encode(delta_N.cpu())) for header, delta_N in updates)
    chunks = comm.gather(messages, upload.ranks, upload.label, HEADER_BYTES + wire.nbytes, header=True)
    kept = Kept(wire.support.numel) if upload.holds else None
    mean = kept or Mean(0 if comm.rank else wire.support.numel)  # the others receive nothing, and hold no sum
    spent, weight = 0.0, 1.0
    for message, offset, chunk_b in chunks:
        began = time.perf_counter()
        if offset == 0:
            headers.append(Header.unpack(chunk_b[:HEADER_BYTES], upload.expected[message]))
            chunk_b, offset = chunk_b[HEADER_BYTES:], HEADER_BYTES
            weight, body = upload.weight(headers[-1]), Body(headers[-1])
            mean.count(weight)
        body.take(chunk_b)
        mean.add(*wire.decode_chunk(offset - HEADER_BYTES, chunk_b), weight)
        spent += time.perf_counter() - began
    return _received(upload, headers, mean, spent, kept) if comm.rank == 0 else None


def _gather_largest(comm: Metered, upload: Upload, wire: TopK, updates: Updates) -> Received | None:
    """Gather top-k messages: each is decoded when it is there as a whole, since it takes O(k)."""
    size = None if wire.varies else HEADER_BYTES + wire.nbytes
    messages = (frame(header, wire.encode(delta_N)) for header, delta_N in updates)
    chunks = comm.gather(messages, upload.ranks, upload.label, size, header=True)
    headers, spent = list[Header](), 0.0
    kept = Kept(wire.support.numel) if upload.holds else None
    mean = kept or Mean(0 if comm.rank else wire.support.numel)  # the others receive nothing, and hold no sum
    for message, whole_B in wholes(chunks, HEADER_BYTES + wire.most):
        began = time.perf_counter()
        expected = replace(upload.expected[message], body_bytes=whole_B.numel() - HEADER_BYTES)
        headers.append(Header.unpack(whole_B[:HEADER_BYTES], expected))
        Body(headers[-1]).take(whole_B[HEADER_BYTES:])
        weight = upload.weight(headers[-1])
        mean.count(weight)
        mean.scatter(*wire.decode(whole_B[HEADER_BYTES:]), weight)
        spent += time.perf_counter() - began
    return _received(upload, headers, mean, spent, kept) if comm.rank == 0 else None


def wholes(chunks: Iterator[Chunk], most: int) -> Iterator[tuple[int, Tensor]]:
    """Put messages together again; raises ``RunError`` for one of fewer bytes than a header or of more than ``most``."""
    for message, parts in groupby(chunks, key=lambda chunk: chunk[0]):
        found, size = list[Tensor](), 0
        for _, _, chunk_b in parts:
            found.append(chunk_b.clone())
            size += chunk_b.numel()
            if size > most:
                raise RunError(f"message {message}: more than {most} bytes")
        if size < HEADER_BYTES:
            raise RunError(f"message {message}: {size} bytes, fewer than a header's")
        yield message, torch.cat(found)


def reduce(comm: Metered, upload: Upload, updates: Updates) -> Received | None:
    """Sum the weighted updates of all ranks to rank 0, and gather the headers beside them. Returns None on other ranks.

    Nobody sees single updates but the rank that has made them: it leaves out those that are not finite, and its headers say so.
    """
    own, sum_N = list[Header](), torch.zeros(upload.wire.support.numel)
    for header, delta_N in updates:
        sound = finite(delta_N)
        own.append(header if sound else replace(header, num_examples=0, loss=0.0, reason=header.reason or "not finite"))
        if sound:
            sum_N.add_(delta_N.cpu(), alpha=upload.weight(header))
    comm.reduce(sum_N, upload.label, clients=len(own))
    label = Label(upload.label.phase, upload.label.round, "control", {"header": HEADER_BYTES})
    packed = comm.gather((header.pack() for header in own), upload.ranks, label, HEADER_BYTES)
    headers = [Header.unpack(chunk_b, upload.expected[message]) for message, _, chunk_b in packed]
    if comm.rank:
        return None
    began = time.perf_counter()
    weight = upload.total(headers)
    return Received(headers, sum_N / weight, weight, time.perf_counter() - began, left_out=left_out(headers))


def joined(found: Sequence[tuple[Part, Received]], numel: int) -> Received:
    """Return what the uploads of a round brought as one, in client order: updates of ``numel`` entries, zero outside their parts.

    One alone with all ``numel`` entries is left as it is. Raises ``RunError`` when no client has an update.
    """
    headers = sorted((header for _, one in found for header in one.headers), key=lambda header: header.client)
    absent = {client: reason for _, one in found for client, reason in one.left_out.items()}
    if len(absent) == len(headers):
        raise RunError(f"no client has an update: {absent[headers[0].client]}")
    part, only = found[0]
    if len(found) == 1 and part.support.numel == numel:
        return only
    total, mean_N = sum(one.weight for _, one in found), torch.zeros(numel)
    for part, one in found:
        if one.weight:
            mean_N.add_(part.spread(one.mean_N, numel), alpha=one.weight / total)
    return Received(headers, mean_N, total, sum(one.seconds for _, one in found), _joined(found, numel), absent)


def _joined(found: Sequence[tuple[Part, Received]], numel: int) -> Kept | None:
    """Return the kept updates of all, in client order."""
    own = {
        header.client: (weight, part.spread(update_n, numel))
        for part, one in found
        if one.kept
        for header, (weight, update_n) in zip(one.headers, one.kept.items(), strict=True)
    }
    kept = Kept(numel)
    for _, (weight, update_N) in sorted(own.items()):
        kept.count(weight)
        kept.add(0, update_N, weight)
    return kept if own else None


def _received(upload: Upload, headers: list[Header], mean: Mean | Kept, seconds: float, kept: Kept | None) -> Received:
    weight = mean.weight
    return Received(headers, mean.result(), weight, seconds, kept, left_out(headers, mean.refused))


def left_out(headers: Sequence[Header], refused: Collection[int] = ()) -> dict[int, str]:
    """Return {client: reason} of those who say that they are, and of those whose places rank 0 has ``refused``."""
    every = enumerate(headers)
    return {header.client: header.reason or "not finite" for at, header in every if header.reason or at in refused}


def choose(comm: Metered, wire: Wire | TopK | Fixed, phase: str, number: int) -> Collective:
    """Return the faster of ``gather`` and ``reduce`` on this transport for messages of this size, as measured now by rank 0."""
    if comm.size == 1:
        return "gather"
    probe_B = torch.zeros(max(8, min(wire.nbytes, PROBE_BYTES)) // 8 * 8, dtype=torch.uint8)
    label = Label(phase, number, "control", {"probe": probe_B.numel()})
    senders = comm.members[1:]

    def gathered() -> None:
        for _ in comm.gather([probe_B] if comm.rank else [], senders, label, probe_B.numel()):
            pass

    def reduced() -> None:
        comm.reduce(probe_B.view(torch.float32), label, clients=1)

    faster = _fastest(gathered) <= _fastest(reduced)
    return announce(comm, "gather" if faster else "reduce", phase, number)


def announce(comm: Metered, chosen: Collective, phase: str, number: int) -> Collective:
    """Return on every rank what rank 0 has chosen."""
    if comm.size == 1:
        return chosen
    (gather_wins,) = tell(comm, [int(chosen == "gather")], Label(phase, number, "control", {"choice": 8}))
    return "gather" if gather_wins else "reduce"


def _fastest(operation: Callable[[], None]) -> float:
    seconds = []
    for _ in range(1 + PROBES):  # the first one opens connections
        began = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
