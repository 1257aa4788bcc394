"""What a message costs on a link: seconds from bytes, rate and latency. Pure arithmetic; nothing here sleeps or measures.

A *link* joins a client to the network, the server's own joins all of them. Rates are Mbit/s (10^6 bit) of the link, headers included, so
that a message takes ``FRAMING`` times its bytes. TCP's slow start is not modelled. What a sender's *kernel* takes at once travels while
the sender goes on: see ``passed_on``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from slora_dist.errors import ConfigError

FRAMING = 1514 / 1448  # bytes on an Ethernet link for each byte of TCP payload, at an MTU of 1500 with time stamps
KERNEL = 512 << 10  # bytes of a message that a sender's kernel takes at once: measured 0.4 to 0.6 MB at 10 Mbit/s, 1 MB at 100


def check_rates(mbit: Sequence[float]) -> None:
    """Raise ``ConfigError`` when one of the rates of ``--mbit`` is none."""
    for rate in mbit:
        if not 0 < rate < inf:
            raise ConfigError("--mbit", f"{rate:g} is no bandwidth", "numbers above 0")


@dataclass(frozen=True)
class Link:
    """A client's link: Mbit/s up and down, seconds of latency one way and their standard deviation."""

    up_mbit: float = inf
    down_mbit: float = inf
    latency: float = 0.0
    jitter: float = 0.0


def seconds(nbytes: float, mbit: float) -> float:
    """Return how long a message occupies a link of ``mbit``."""
    return nbytes * FRAMING * 8 / (mbit * 1e6)


def fair(starts: Sequence[float], nbytes: Sequence[float], caps: Sequence[float], capacity: float) -> list[float]:
    """Return when each of several transfers ends that share a link of ``capacity`` Mbit/s, each at most at its own cap (Mbit/s).

    The rates are max-min fair at any time, as long-lived TCP connections share a bottleneck. ``starts`` are in seconds.
    """
    left = [seconds(count, 1.0) for count in nbytes]  # Mbit still to go
    ends, now = list(starts), min(starts, default=0.0)
    waiting = sorted(range(len(starts)), key=lambda at: starts[at])
    active: list[int] = []
    while waiting or active:
        while waiting and starts[waiting[0]] <= now:
            active.append(waiting.pop(0))
        rates = _shares([caps[at] for at in active], capacity)
        until = min([left[at] / rate for at, rate in zip(active, rates, strict=True)], default=inf)
        step = min(until, starts[waiting[0]] - now) if waiting else until
        for at, rate in zip(list(active), rates, strict=True):
            done = left[at] / rate <= step
            left[at] = 0.0 if done else left[at] - rate * step
            if done:
                ends[at] = now + step
                active.remove(at)
        now += step
    return ends


def _shares(caps: Sequence[float], capacity: float) -> list[float]:
    """Share ``capacity`` max-min fairly: nobody gets more than its cap, and what it leaves goes to the others alike."""
    if capacity == inf:
        return list(caps)
    rates, free, open_ = [0.0] * len(caps), capacity, len(caps)
    for at in sorted(range(len(caps)), key=lambda at: caps[at]):
        rates[at] = min(caps[at], free / open_)
        free, open_ = free - rates[at], open_ - 1
    return rates


@dataclass(frozen=True)
class Passed:
    """A rank's part of a broadcast, in seconds since it began: it has the message, goes on, and its link has carried all its copies."""

    has: float
    through: float
    free: float


def passed_on(size: int, copy: float, kernel: float, latencies: Sequence[float]) -> list[Passed]:
    """Return each rank's part of a broadcast down a binomial tree, gloo's: a rank sends to all its children once it has the message.

    ``copy`` is what a copy takes on a link, ``kernel`` the part of it that a sender's kernel takes at once. A rank goes on when its kernel
    holds the rest. Its copies leave in turns of ``kernel``: one after the other when they are that short, side by side when they are long.
    ``latencies[rank]`` are seconds one way. All links are alike.
    """
    has, passed = [0.0] * size, list[Passed]()
    for rank in range(size):  # what stands in ``has`` then is settled: a parent's number is smaller than its children's
        bits = range(rank.bit_length(), size.bit_length())  # the children of a rank have one more bit above its highest
        children = [rank | 1 << bit for bit in bits if rank | 1 << bit < size]
        through = has[rank] + len(children) * (copy - kernel)
        for place, child in enumerate(children, 1):
            has[child] = through + place * kernel + latencies[child]
        passed.append(Passed(has[rank], through, has[rank] + len(children) * copy))
    return passed


def read_in_order(ready: Sequence[float], messages: Sequence[Sequence[float]], asked: float) -> list[float]:
    """Return when rank 0 has each of the messages that it reads in order, over one link.

    ``messages[i]`` are the seconds on the link of each receive that message i takes, ``ready`` says when it could leave, ``asked`` when
    rank 0 begins. It has the next receive posted while it waits for one: so one message may overtake, and no more.
    """
    queue = [(index, spent) for index, parts in enumerate(messages) for spent in parts]
    ends, early = [asked] * len(messages), None
    arrived = link = posted = posted_next = asked
    for at, (index, spent) in enumerate(queue):
        start, overtaken = max(ready[index], posted), None
        if early is None:
            if at + 1 < len(queue) and (other := max(ready[queue[at + 1][0]], posted_next)) < start:
                overtaken = link = max(link, other) + queue[at + 1][1]
            early = link = max(link, start) + spent
        arrived = ends[index] = max(arrived, early)
        early, posted, posted_next = overtaken, posted_next, arrived
    return ends


def receives(nbytes: int, bucket: int) -> list[int]:
    """Return the bytes of each receive of a message of ``nbytes``."""
    return [min(bucket, nbytes - offset) for offset in range(0, max(nbytes, 1), bucket)]


class Routing(Protocol):
    """How messages travel between rank 0, whose link has ``capacity`` Mbit/s each way, and the ranks, or clients, behind ``links``."""

    @property
    def capacity(self) -> float:
        """Mbit/s of rank 0's link."""

    def down(self, links: Sequence[Link], nbytes: int) -> list[Passed]:
        """Return rank 0's part of a broadcast, and that of each link."""

    def up(self, links: Sequence[Link], ready: Sequence[float], nbytes: Sequence[int], asked: float) -> list[float]:
        """Return when rank 0, which reads from ``asked`` on, has the message that each link could send from ``ready`` on."""


@dataclass(frozen=True)
class Direct:
    """The server sends every client its own copy; all links work at the same time."""

    capacity: float

    def down(self, links: Sequence[Link], nbytes: int) -> list[Passed]:
        """See ``Routing``. The server itself goes on at once."""
        sent = fair([0.0] * len(links), [nbytes] * len(links), [link.down_mbit for link in links], self.capacity)
        ends = [0.0, *(end + link.latency for end, link in zip(sent, links, strict=True))]
        return [Passed(end, end, end) for end in ends]

    def up(self, links: Sequence[Link], ready: Sequence[float], nbytes: Sequence[int], asked: float) -> list[float]:
        """See ``Routing``."""
        ends = fair([max(asked, start) for start in ready], nbytes, [link.up_mbit for link in links], self.capacity)
        return [end + link.latency for end, link in zip(ends, links, strict=True)]


@dataclass(frozen=True)
class Collective:
    """Ranks behind links that are all alike pass copies on, and rank 0 reads one message after the other, ``bucket`` bytes a receive."""

    capacity: float
    bucket: int
    kernel: int = KERNEL

    def down(self, links: Sequence[Link], nbytes: int) -> list[Passed]:
        """See ``Routing``. The rate is that of the slowest link."""
        slowest = min([self.capacity, *(link.down_mbit for link in links)])
        kernel = seconds(min(nbytes, self.kernel), slowest)
        return passed_on(len(links) + 1, seconds(nbytes, slowest), kernel, [0.0, *(link.latency for link in links)])

    def up(self, links: Sequence[Link], ready: Sequence[float], nbytes: Sequence[int], asked: float) -> list[float]:
        """See ``Routing``."""
        starts = [start + link.latency for start, link in zip(ready, links, strict=True)]
        rates = [min(link.up_mbit, self.capacity) for link in links]
        parts = [[seconds(part, rate) for part in receives(count, self.bucket)] for count, rate in zip(nbytes, rates, strict=True)]
        return read_in_order(starts, parts, asked)


@dataclass(frozen=True)
class Milestones:
    """A client's round: when it had the message, had trained, and when its update had arrived, in seconds since the round began."""

    downloaded: float
    trained: float
    uploaded: float


def play(
    routing: Routing, links: Sequence[Link], nbytes: tuple[int, int], train: Sequence[float], agreed: Sequence[tuple[int, int]] = ()
) -> list[Milestones]:
    """Return every client's round. ``nbytes`` is the message down and up, ``train`` each client's seconds of training.

    ``agreed`` are the bytes (up, down) of what all clients exchange with rank 0 between training and upload, one after the other.
    """
    root, *passed = routing.down(links, nbytes[0])
    trained = [one.through + spent for one, spent in zip(passed, train, strict=True)]
    ready = [max(end, one.free) for end, one in zip(trained, passed, strict=True)]
    asked = root.through
    for up, down in agreed:
        told = max(routing.up(links, ready, [up] * len(links), asked))
        root, *heard = routing.down(links, down)
        ready, asked = [told + one.through for one in heard], told + root.through
    uploaded = routing.up(links, ready, [nbytes[1]] * len(links), asked)
    return [Milestones(one.through, *ends) for one, *ends in zip(passed, trained, uploaded, strict=True)]
