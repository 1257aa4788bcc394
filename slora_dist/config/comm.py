"""Settings of transport and wire."""

from typing import Literal

from pydantic import Field

from slora_dist.section import Positive, Section, Share

Values = Literal["float32", "bfloat16", "float16", "int8", "int4"]
SumBits = Literal[32, 64]
Indices = Literal["implicit", "gap", "gap+zstd", "int32"]


class WireConfig(Section):
    """How numbers become bytes."""

    values: Values = Field(
        "float32",
        description="Number format of values and factors: float32, bfloat16, float16 with a scale, int8 with a float32 scale for each block of 128, int4 for each of 32.",
    )
    up_values: Values | None = Field(None, description="Number format of what clients send. Empty: that of `values`.")
    down_values: Values | None = Field(None, description="Number format of what the server sends. Empty: that of `values`.")
    indices: Indices = Field(
        "implicit",
        description="Masked positions: derived from the seed on every rank, or sent before the values as gaps in bytes, as such gaps through zstandard, or as int32. With `topk` the positions of an upload.",
    )
    topk: Share | None = Field(
        None, description="Share of its coordinates that a client sends: those whose update is largest, with their positions. Empty: all."
    )
    feedback: bool = Field(
        True,
        description="Error feedback: with `topk` a client adds what it has not sent to its next update; every client then stays on one rank.",
    )

    @property
    def up(self) -> Values:
        """The number format of uploads."""
        return self.up_values or self.values

    @property
    def down(self) -> Values:
        """The number format of broadcasts."""
        return self.down_values or self.values


class CommConfig(Section):
    """The transport."""

    backend: Literal["auto", "gloo", "nccl", "mpi"] = Field(
        "auto", description="`auto`: MPI under an MPI launcher, else nccl with CUDA, else gloo; a world of one needs none."
    )
    wire: WireConfig = Field(WireConfig(), description="Number formats on the wire.")
    collective: Literal["gather", "reduce", "auto"] = Field(
        "gather",
        description="Upload: every update to rank 0, added in client order; or summed on the way, in the transport's order (other last bits); `auto` measures both.",
    )
    client_timeout: Positive = Field(
        60.0,
        ge=5,
        description="Seconds of silence after which a rank counts as dead, where `clients.min_clients` lets a run go on without it: 5 or more, since a rank says each second that it lives.",
    )
    sum: Literal["float", "exact"] = Field(
        "float",
        description="How updates are added: as float32; or as integers under a scale that a round's clients agree on, so that the order of addition changes no bit.",
    )
    sum_bits: SumBits = Field(32, description="Bits of an integer of an exact sum, 32 or 64: what travels for each value.")
    secure: bool = Field(
        False,
        description="Secure aggregation: clients mask the integers of an exact sum in pairs, so that rank 0 learns nothing but the sum.",
    )
    timeout: Positive = Field(
        1800.0, description="Seconds that a rank waits for another inside one operation; must cover a client's training."
    )
    encrypt: bool = Field(
        False,
        description="Seal all that is broadcast and gathered with AES-256-GCM, under a key made of the job's secret; not possible for sums on the way.",
    )
    secret: Literal["auto", "required"] = Field(
        "auto",
        description="Whether a job without a secret may start. With one (`SLORA_DIST_SECRET`, `SLORA_DIST_SECRET_FILE`; the scripts make it) every rank must prove that it has it.",
    )
