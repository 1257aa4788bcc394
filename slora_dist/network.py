"""The emulated network of a run: which link each client has, and what a round takes on these links."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf

import numpy as np

from slora_dist.comm.base import BUCKET
from slora_dist.comm.shaped import Shaped
from slora_dist.config import Config, LinkConfig
from slora_dist.data.permutation import permutation
from slora_dist.fixed import SCALE_BYTES
from slora_dist.links import Collective, Direct, Link, Routing, play, receives
from slora_dist.roundplan import RoundPlan
from slora_dist.secure import KEY_BYTES
from slora_dist.seeding import derive


def links(config: Config) -> list[Link]:
    """Return the link of every client: the classes by their shares of the clients, dealt by the run's seed."""
    classes = list(config.network.classes.values())
    if not classes:
        return [_link(config.network)] * config.clients.count
    shares = np.array([entry.share for entry in classes])
    ends = np.round(np.cumsum(shares) / shares.sum() * config.clients.count).astype(int)
    places = permutation(config.clients.count, derive(config.run.seed, "network"))
    return [_link(classes[int(np.searchsorted(ends, place, side="right"))]) for place in places]


def routing(config: Config) -> Routing:
    """Return how messages travel on the run's links."""
    capacity = config.network.server_mbit or inf
    return Direct(capacity) if config.network.routing == "direct" else Collective(capacity, BUCKET)


def parts(nbytes: int) -> list[int]:
    """Return the bytes of each receive that a message takes on every transport."""
    return receives(nbytes, BUCKET)


def agreements(config: Config, clients: int) -> dict[str, tuple[int, int]]:
    """Return what ``clients`` of a round exchange when all have trained and before an update leaves: {kind: bytes of one up, down}."""
    found = {"scale": (SCALE_BYTES, SCALE_BYTES)} if config.comm.sum == "exact" else {}
    return found | ({"key": (KEY_BYTES, KEY_BYTES * clients)} if config.comm.secure else {})


class Network:
    """The links of a run. ``shaped`` is the communicator that delays messages, in mode ``sleep``."""

    def __init__(self, config: Config, shaped: Shaped | None) -> None:
        self.settings, self._seed, self._shaped = config.network, config.run.seed, shaped
        self._links, self._routing, self._agreements = links(config), routing(config), partial(agreements, config)

    def begin(self, plan: RoundPlan, number: int) -> None:
        """Put each rank behind the link of the client that it plays in round ``number``."""
        if self._shaped:
            drawn = (self._at(client, number) for client in plan.clients)
            self._shaped.links = dict(zip(plan.ranks, drawn, strict=True))

    def seconds(
        self, plan: RoundPlan, number: int, nbytes: tuple[int, int], train: Sequence[float], server: float
    ) -> Mapping[str, float] | None:
        """Return what round ``number`` takes on the links, or None when they are off.

        ``nbytes`` is the message down and up, ``train`` the clients' measured seconds of training, ``server`` those of rank 0 afterwards.
        ``seconds`` is the whole round; ``download``, ``train`` and ``upload`` are those of the client that was last, ``server`` as given.
        """
        if self.settings.mode == "off":
            return None
        own = [self._at(client, number) for client in plan.clients]
        rounds = play(self._routing, own, nbytes, train, list(self._agreements(len(own)).values()))
        last = max(rounds, key=lambda one: one.uploaded)
        return {
            "seconds": last.uploaded + server,
            "download": last.downloaded,
            "train": last.trained - last.downloaded,
            "upload": last.uploaded - last.trained,
            "server": server,
        }

    def _at(self, client: int, number: int) -> Link:
        """Return the client's link with the latency of this round: normal around its own, never negative."""
        link = self._links[client]
        draw = np.random.Generator(np.random.Philox(derive(self._seed, "latency", number, client)))
        latency = max(0.0, link.latency + link.jitter * float(draw.standard_normal()))
        return Link(link.up_mbit, link.down_mbit, latency)


def _link(settings: LinkConfig) -> Link:
    return Link(settings.up_mbit or inf, settings.down_mbit or inf, settings.latency_ms / 1e3, settings.jitter_ms / 1e3)
