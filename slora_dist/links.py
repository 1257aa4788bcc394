"""What a message costs on a link: seconds from bytes, rate and latency. Pure arithmetic; nothing here sleeps or measures.

A *link* joins a client to the network, the server's own joins all of them. Rates are Mbit/s (10^6 bit) of the link, headers included, so
that a message takes ``FRAMING`` times its bytes. TCP's slow start is not modelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

FRAMING = 1514 / 1448  # bytes on an Ethernet link for each byte of TCP payload, at an MTU of 1500 with time stamps


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


def tree(size: int) -> list[int]:
    """Return when each rank is through with a broadcast down a binomial tree, in message times of one link.

    A rank sends to all its children at the same time once it has the whole message, and is through when they have it: gloo's algorithm.
    Every link is alike.
    """
    through = [0] * size
    for rank in range(size):  # what stands there is when the message arrives: a parent's number is smaller than its children's
        bits = range(rank.bit_length(), size.bit_length())  # the children of a rank have one more bit above its highest
        children = [rank | 1 << bit for bit in bits if rank | 1 << bit < size]
        through[rank] += len(children)
        for child in children:
            through[child] = through[rank]
    return through


def sent_to_each(links: Sequence[Link], capacity: float, nbytes: int) -> list[float]:
    """Return when each client has the message of which the server sends every client a copy, over its link of ``capacity`` Mbit/s."""
    sent = fair([0.0] * len(links), [nbytes] * len(links), [link.down_mbit for link in links], capacity)
    return [end + link.latency for end, link in zip(sent, links, strict=True)]


def passed_on(links: Sequence[Link], capacity: float, nbytes: int) -> list[float]:
    """Return when rank 0 and the ranks behind ``links`` are through with a broadcast down the tree, at the rate of the slowest link."""
    once = seconds(nbytes, min([capacity, *(link.down_mbit for link in links)]))
    latencies = [0.0, *(link.latency for link in links)]
    return [turns * once + latencies[rank] * rank.bit_count() for rank, turns in enumerate(tree(len(links) + 1))]


@dataclass(frozen=True)
class Exchange:
    """A client's round: when it had the message, had trained, and when its update had arrived, in seconds since the round began."""

    downloaded: float
    trained: float
    uploaded: float


def play(links: Sequence[Link], capacity: float, nbytes: tuple[int, int], train: Sequence[float]) -> list[Exchange]:
    """Return every client's round when the server sends each its own copy and all links work at the same time.

    ``capacity`` is the server's link in Mbit/s each way, ``nbytes`` the message down and up, ``train`` each client's seconds of training.
    """
    count, (down, up) = len(links), nbytes
    downloaded = sent_to_each(links, capacity, down)
    trained = [end + spent for end, spent in zip(downloaded, train, strict=True)]
    received = fair(trained, [up] * count, [link.up_mbit for link in links], capacity)
    uploaded = [end + link.latency for end, link in zip(received, links, strict=True)]
    return [Exchange(*ends) for ends in zip(downloaded, trained, uploaded, strict=True)]


def play_collective(links: Sequence[Link], capacity: float, nbytes: tuple[int, int], train: Sequence[float]) -> list[Exchange]:
    """Return every client's round when each is a rank: the message comes down a tree, and updates are read one after the other."""
    _, *arrivals = passed_on(links, capacity, nbytes[0])
    rounds, free = list[Exchange](), 0.0
    for link, downloaded, spent in zip(links, arrivals, train, strict=True):
        trained = downloaded + spent
        free = max(free, trained + link.latency) + seconds(nbytes[1], min(link.up_mbit, capacity))
        rounds.append(Exchange(downloaded, trained, free))
    return rounds
