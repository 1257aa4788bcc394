"""What ranks tell each other besides updates: short control messages, all of them in the ledger.

Legend: B bytes.
"""

import json

import torch

from slora_dist.comm.metered import Metered
from slora_dist.errors import ConfigError
from slora_dist.ledger import Label
from slora_dist.wire import as_bytes


def gather_bytes(comm: Metered, mine: bytes, label: Label) -> dict[int, bytes]:
    """Bring every rank's ``mine`` to rank 0: {rank: bytes} there, in rank order; empty elsewhere. Sizes may differ."""
    parts: dict[int, bytearray] = {}
    for at, _, chunk_b in comm.gather([as_bytes(mine)], comm.members, label, None):
        parts.setdefault(comm.members[at], bytearray()).extend(chunk_b.numpy().tobytes())
    return {rank: bytes(part) for rank, part in parts.items()}


def tell(comm: Metered, numbers: list[int], label: Label) -> list[int]:
    """Return rank 0's ``numbers`` on every rank; all give a list of the same length."""
    wire_B = torch.tensor(numbers, dtype=torch.int64).view(torch.uint8)
    comm.broadcast(wire_B, label, clients=1)
    return [int(number) for number in wire_B.view(torch.int64)]


def agree(comm: Metered, problem: ConfigError | None) -> None:
    """Raise on every rank the first rank's ``ConfigError``, so that all end before any training; return when there is none."""
    mine = json.dumps([problem.setting, problem.problem, problem.allowed]).encode() if problem else b""
    label = Label("start", 0, "control", {"problem": 0})
    problems = [text for text in gather_bytes(comm, mine, label).values() if text]
    first = problems[0] if problems else b""
    (size,) = tell(comm, [len(first)], Label("start", 0, "control", {"problem": 8}))
    if size:
        wire_B = as_bytes(first) if comm.rank == 0 else torch.empty(size, dtype=torch.uint8)
        comm.broadcast(wire_B, Label("start", 0, "control", {"problem": size}), clients=1)
        error = ConfigError(*json.loads(wire_B.numpy().tobytes()))
        error.agreed = True
        raise error
