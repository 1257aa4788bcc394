"""Rank 0's mean of updates that arrive in buckets, against copying the same bytes, and against adding them up as COO tensors.

Legend: N coordinates, B bytes.
"""

import torch
from torch import Tensor

from benchmarks.common import RUNS, Row, interleave, middle, ratio
from slora_dist.aggregate.mean import Mean
from slora_dist.comm.base import BUCKET, cut
from slora_dist.masks import random_mask
from slora_dist.support import Slot, Support
from slora_dist.wire import Wire

SHAPE, DENSITY = (22_700_000,), 0.01  # a MiniLM
SPARSE_CLIENTS, DENSE_CLIENTS = 24, 8


def mean(wire: Wire, messages: list[Tensor]) -> Tensor:
    """Return the mean of messages as rank 0 takes it: bucket after bucket."""
    total = Mean(wire.support.numel)
    for wire_B in messages:
        total.count(1.0)
        for offset, part_b in cut(wire_B, BUCKET):
            total.add(*wire.decode_chunk(offset, part_b), 1.0)
    return total.result()


def copies(messages: list[Tensor], target_B: Tensor) -> None:
    """Copy each message to one place: what moving the bytes through memory costs."""
    for wire_B in messages:
        target_B.copy_(wire_B)


def coalesce(index_M: Tensor, values: list[Tensor]) -> Tensor:
    """Return the mean by way of COO tensors, as general sparse formats are added."""
    index_KM, value_KM = index_M.repeat(len(values))[None], torch.cat(values)
    return torch.sparse_coo_tensor(index_KM, value_KM, SHAPE, check_invariants=False).coalesce() / len(values)


def measured(wire: Wire, clients: int) -> tuple[dict[str, list[float]], list[Tensor]]:
    """Return the seconds of mean and copy, and the updates."""
    updates = [torch.randn(wire.support.numel, generator=torch.Generator().manual_seed(client)) for client in range(clients)]
    messages = [wire.encode(delta_N) for delta_N in updates]
    target_B = torch.zeros(wire.nbytes, dtype=torch.uint8)
    found = mean(wire, messages)
    torch.testing.assert_close(found, torch.stack(updates).double().mean(0).float(), atol=1e-6, rtol=1e-5)
    return interleave({"mean": lambda: mean(wire, messages), "copy": lambda: copies(messages, target_B)}, 2 * RUNS), updates


def rows() -> list[Row]:
    """Return the rows of the mean: of sparse updates and of whole ones."""
    index_M = random_mask(SHAPE[0], round(DENSITY * SHAPE[0]), seed=1)
    found = []
    for name, slot, clients in (
        ("1 % of a MiniLM", Slot("w", SHAPE, "value", len(index_M), mask_seed=1), SPARSE_CLIENTS),
        ("a whole MiniLM", Slot.whole("w", SHAPE, "value"), DENSE_CLIENTS),
    ):
        seconds, updates = measured(Wire(Support([slot]), "float32", "implicit"), clients)
        beside = {"GB/s": 4e-9 * clients * slot.count / middle(seconds["mean"])}
        if slot.count < SHAPE[0]:
            coo = interleave({"coo": lambda values=updates: coalesce(index_M, values)}, 2)["coo"]
            beside["COO coalesce over ours"] = middle(coo) / middle(seconds["mean"])
        against = "copying the same bytes once"
        found.append(Row(f"mean: {clients} updates, {name}", ratio(seconds["mean"], seconds["copy"]), 2.0, 1.0, 2 * RUNS, against, beside))
    return found
