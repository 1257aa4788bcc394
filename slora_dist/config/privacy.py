"""Settings of differential privacy."""

from typing import Annotated, Literal

from pydantic import Field

from slora_dist.section import NonNegative, Positive, Section, Share


class PrivacyConfig(Section):
    """Differential privacy of clients: a bound on each client's update, and noise on their sum."""

    clip: Positive | None = Field(None, description="L2 norm to which a client's update is scaled down if it is longer. Empty: no bound.")
    noise_multiplier: NonNegative = Field(
        0.0, description="Standard deviation of the noise on the sum of updates, in units of `clip`. Needs the extra `dp`; 0: none."
    )
    delta: Annotated[Share, Field(lt=1)] = Field(
        1e-5, description="Delta for which epsilon is told; should be well below 1 / `clients.count`."
    )
    noise: Literal["central", "distributed"] = Field(
        "central", description="Rank 0 adds the noise to the sum; or every client its part before its integers are masked (`comm.secure`)."
    )
    seeded: bool = Field(
        False,
        description="Noise from the run's seed in place of the system's randomness: runs repeat, and nothing is hidden from who knows the seed.",
    )
