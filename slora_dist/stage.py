"""One phase of a run as a rank holds it, and what is told of the switch to it.

Legend: N coordinates, B bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slora_dist.aggregate.factors import Pair
from slora_dist.aggregate.server import Server
from slora_dist.config import LowrankPhase
from slora_dist.evaluate import Score
from slora_dist.exchange import Exchange
from slora_dist.ledger import Direction, Label
from slora_dist.methods import AnyPhase, Start
from slora_dist.support import Support
from slora_dist.svd import Factors
from slora_dist.upload import Collective


@dataclass
class Stage:
    """One phase as a rank holds it: its coordinates and messages, the reference of the offsets, and on rank 0 the server's state.

    ``held_N`` is the offset as clients hold it, made of all broadcasts so far, ``variate_n`` the server's control variate likewise. On
    rank 0 ``held_N`` may be the server's own vector, which is good until the server moves it.
    """

    at: int
    name: str
    phase: AnyPhase
    first: int  # number of its first round in the run
    coordinates: Support
    exchange: Exchange
    pairs: list[Pair]
    reference_N: Tensor
    held_N: Tensor
    variate_n: Tensor
    server: Server | None
    collective: Collective
    found: Mapping[str, Factors]  # the part of the base that begins as the phase's factors, by layer
    mask_B: Tensor | None = None  # as it has travelled, where clients' gradients chose it

    def label(self, number: int, direction: Direction, by_kind: Mapping[str, int]) -> Label:
        """Return the ledger's label of a message of this phase."""
        return Label(self.name, number, direction, dict(by_kind))


def switch_record(before: Score, after: Score, phase: AnyPhase, start: Start) -> dict[str, Any]:
    """Return what ``summary.json`` says of a switch: scores before and after it, and how the factors compare with the update."""
    (kept, kept_total), (missed, missed_total) = start.shares("kept_energy"), start.shares("observed_residual")
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "init": ((phase.init or "svd") if start.found else "kaiming") if isinstance(phase, LowrankPhase) else None,
        "kept_energy": kept,
        "kept_energy_total": kept_total,
        "observed_residual": missed,
        "observed_residual_total": missed_total,
    }
