"""Settings of the server."""

from typing import Literal

from pydantic import Field

from slora_dist.section import Positive, Real, Section


class ServerConfig(Section):
    """How rank 0 combines updates and judges the result."""

    optimizer: Literal["sgd", "adam", "yogi"] = Field(
        "sgd", description="Optimiser on the negative mean update: `sgd` with lr 1 is FedAvg, with momentum FedAvgM; FedAdam; FedYogi."
    )
    lr: Positive = Field(1.0, description="Server learning rate.")
    momentum: Real = Field(0.0, ge=0, lt=1, description="Momentum of `sgd`, beta1 of `adam` and `yogi`.")
    beta2: Real = Field(0.99, ge=0, lt=1, description="Second-moment decay of `adam` and `yogi`.")
    eps: Positive = Field(1e-3, description="Adaptivity (tau) of `adam` and `yogi`.")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Mean over clients: all alike (the paper), or by number of examples."
    )
    svd: Literal["root", "ranks"] = Field(
        "root", description="Who factors the matrices at a switch: rank 0, or every rank its share, for which the update travels once more."
    )
    eval_every: int = Field(1, ge=0, description="Rounds between evaluations; 0: only at the end of each phase.")
    evaluate: Literal["inline", "overlap"] = Field(
        "inline",
        description="`overlap`: rank 0 judges a round's model while the others train in the next one; same scores. The last round of a phase, and a world of one, stay `inline`.",
    )
