"""Settings of transport and wire."""

from typing import Literal

from pydantic import Field

from slora_dist.section import Positive, Section


class WireConfig(Section):
    """How numbers become bytes."""

    values: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="Number format of values and factors; `int8` comes with a float32 scale for each block of 128."
    )
    indices: Literal["implicit", "gap", "gap+zstd", "int32"] = Field(
        "implicit",
        description="Masked positions: derived from the seed on every rank, or sent before the values as gaps in bytes, as such gaps through zstandard, or as int32.",
    )


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
    timeout: Positive = Field(
        1800.0, description="Seconds that a rank waits for another inside one operation; must cover a client's training."
    )
