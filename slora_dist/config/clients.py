"""Settings of the clients."""

from typing import Literal

from pydantic import Field

from slora_dist.section import Key, NonNegative, Positive, Real, Section


class ClientsConfig(Section):
    """Who takes part, and how a client trains."""

    count: int = Field(4, ge=1, description="N, the clients that there are.")
    per_round: int | None = Field(None, ge=1, description="K, the clients sampled each round, without replacement. Empty: all.")
    epochs: int = Field(1, ge=1, description="Local epochs each round.")
    steps: int | None = Field(None, ge=1, description="Local optimiser steps each round, in place of epochs.")
    round_deadline: Positive | None = Field(
        None,
        description="Seconds that a client may train in a round: one that takes longer stops after the step in hand and is left out. Empty: as long as it takes. What is late depends on the machine, so such runs need not repeat.",
    )
    batch_size: int = Field(32, ge=1, description="Documents in a local step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Local optimiser, made anew each round.")
    min_clients: int | None = Field(
        None,
        ge=1,
        description="Go on without a rank that dies, and without its clients, as long as so many clients are left. Ranks on gloo that no agent watches (srun tasks, `launch/ranks.sh`), or on Open MPI 5 with ULFM (`FT=ulfm launch/mpirun.sh`). Every client then stays on one rank. Empty: a death ends the run.",
    )
    away: dict[Key, list[int]] = Field(
        {},
        description="Clients that are away as planned, `{client: [first, last]}`: rounds in which it cannot be sampled; `[first]` for good. A death that is healed has the same effect.",
    )
    prox: NonNegative = Field(0.0, description="FedProx's mu: a pull of mu (w - w_0) back to the weights that the client was given.")
    scaffold: bool = Field(
        False,
        description="SCAFFOLD: control variates correct the drift of local gradients; they travel with every update, both ways. Needs `optimizer: sgd`.",
    )
    keep: list[Literal["factor_b", "head"]] = Field(
        [], description="Coordinates that every client keeps to itself: B of low-rank phases (FedSA-LoRA), the head, or both."
    )
    holdout: Real = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of its documents that a client holds out, to tell how good the model is for it, with what it keeps: at least one where it has two or more. 0: nothing is held out.",
    )
    eval_every: int = Field(
        0, ge=0, description="Rounds between evaluations on the clients' held-out documents; 0: only after the last round."
    )
    weight_decay: NonNegative = Field(0.0, description="Weight decay of the local optimiser; it moves trainable weights only.")

    def away_in(self, number: int) -> set[int]:
        """Return the clients that are away as planned in round ``number``."""
        return {client for client, (first, *last) in self.away.items() if first <= number and (not last or number <= last[0])}
