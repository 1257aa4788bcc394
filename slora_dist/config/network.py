"""Settings of emulated links."""

from typing import Annotated, Literal

from pydantic import Field

from slora_dist.section import NonNegative, Off, Positive, Section


class LinkConfig(Section):
    """One class of clients' links."""

    up_mbit: Positive | None = Field(None, description="Mbit/s from a client to the network, headers included. Empty: no limit.")
    down_mbit: Positive | None = Field(None, description="Mbit/s from the network to a client, headers included. Empty: no limit.")
    latency_ms: NonNegative = Field(0.0, description="Milliseconds of latency, one way.")
    jitter_ms: NonNegative = Field(0.0, description="Standard deviation of the latency, drawn anew for every client and round.")


class SharedLinkConfig(LinkConfig):
    """One class of links, and how many clients have it."""

    share: Positive = Field(1.0, description="Share of the clients that have such a link, against the other classes' shares.")


class NetworkConfig(LinkConfig):
    """The links of clients, emulated: what the run would cost in time on them. Bytes and bits do not change."""

    mode: Annotated[Literal["off", "virtual", "sleep"], Off] = Field(
        "off",
        description="`virtual` computes each round's seconds on these links and sleeps nowhere; `sleep` delays the real messages, one client a rank.",
    )
    classes: dict[str, SharedLinkConfig] = Field(
        {}, description="Several kinds of links in place of one: `{phone: {share: 3, up_mbit: 5, down_mbit: 20, latency_ms: 40}, ...}`."
    )
    server_mbit: Positive | None = Field(None, description="Mbit/s of the server's own link, each way. Empty: no limit.")
    routing: Literal["direct", "collective"] = Field(
        "direct",
        description="`direct`: the server sends every client its own copy (phones); `collective`: ranks behind alike links pass copies on (clusters).",
    )
