"""Settings of the server."""

from typing import Literal, get_args

from pydantic import Field

from slora_dist.section import Positive, Real, Section

Aggregate = Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"]
ROBUST = tuple(rule for rule in get_args(Aggregate) if rule != "mean")  # those that hostile clients cannot move far


class ServerConfig(Section):
    """How rank 0 combines updates and judges the result."""

    optimizer: Literal["sgd", "adam", "yogi"] = Field(
        "sgd", description="Optimiser on the negative mean update: `sgd` with lr 1 is FedAvg, with momentum FedAvgM; FedAdam; FedYogi."
    )
    lr: Positive = Field(
        1.0, description="Server learning rate. `adam` and `yogi` need a small one, 0.01 say: it is about what a weight moves in a round."
    )
    momentum: Real = Field(0.0, ge=0, lt=1, description="Momentum of `sgd`, beta1 of `adam` and `yogi`.")
    beta2: Real = Field(0.99, ge=0, lt=1, description="Second-moment decay of `adam` and `yogi`.")
    eps: Positive = Field(1e-3, description="Adaptivity (tau) of `adam` and `yogi`.")
    weighting: Literal["uniform", "examples"] = Field(
        "uniform", description="Mean over clients: all alike (the paper), or by number of examples."
    )
    aggregate: Aggregate = Field(
        "mean",
        description="How updates become one: the mean, or one that hostile clients cannot move far; those keep all K updates of a round in rank 0's memory and let all clients count alike.",
    )
    hostile: int = Field(
        0,
        ge=0,
        description="f, the hostile clients in a round that `trimmed_mean` (values cut off at each end), `krum` and `multi_krum` bear: 1 or more for `trimmed_mean` and `multi_krum`, which are the mean without.",
    )
    svd: Literal["root", "ranks"] = Field(
        "root", description="Who factors the matrices at a switch: rank 0, or every rank its share, for which the update travels once more."
    )
    eval_every: int = Field(1, ge=0, description="Rounds between evaluations; 0: only at the end of each phase.")
    evaluate: Literal["inline", "overlap"] = Field(
        "inline",
        description="`overlap`: rank 0 judges a round's model while the others train in the next one; same scores. The last round of a phase, and a world of one, stay `inline`.",
    )

    @property
    def least(self) -> int:
        """The updates that ``aggregate`` takes to bear ``hostile`` ones among them."""
        return {"mean": 1, "median": 1, "trimmed_mean": 2 * self.hostile + 1}.get(self.aggregate, 2 * self.hostile + 3)
