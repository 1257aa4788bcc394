"""Faults of real links, over gloo: every rank is on a host of its own (a network namespace), and links are cut and throttled in mid-round.

The ranks are forked from this process and enter their hosts. The victim does it to its own link, so that it happens at a given point of a
round, as if somebody had come by just then.
"""

import os
import secrets
import shutil
import time
from contextlib import suppress
from functools import partial

from drill import sabotage
from drill.network import NETWORK, PROGRAMS, Network
from drill.one import HEALING, PATIENCE, PATIENT, RANKS, SECONDS, Drill, Fault, Outcome, away
from drill.processes import output
from drill.ranks import Ranks, Saboteur
from drill.sabotage import POINTS, Deed

RATE = "2mbit"
QUEUES = {"waits": "400ms", "is dropped": "15ms"}  # what becomes of frames that come faster than that, and how long one may wait
BURST = "3kb"  # bytes that a link lets through at once
LOOSE = 1.5  # seconds
ENVIRON = {"MASTER_ADDR": f"{NETWORK}.1", "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_WORLD_SIZE": "1"}


def drop_link(drill: Drill) -> Outcome:
    """A cable is pulled, or an interface goes down: the others go on without the host's rank, which ends by itself."""
    at_switch, point = drill.draw.random() < 0.5, drill.draw.choice(POINTS)
    host = _host(drill.victim)
    with Network(RANKS) as network, _start(drill, network, point, partial(network.set_link, host, "down", at_switch), *PATIENT) as ranks:
        noticed = drill.noticed(ranks, [f"rank {drill.victim} is gone"])
        codes = ranks.wait(SECONDS)
    wanted = {rank: 4 if rank == drill.victim else 3 for rank in range(RANKS)}
    assert codes == wanted, f"exit codes {codes}, should be {wanted}"
    injected = f"{'cable' if at_switch else 'interface'} of rank {drill.victim} cut, round {drill.number}, {point}"
    return drill.outcome(injected, max(0.0, noticed - PATIENCE), away({drill.client: [drill.number]}))


def loose_link(drill: Drill) -> Outcome:
    """A cable is pulled and put back within ``comm.client_timeout``: TCP sends again, and nothing is lost."""
    point, host = drill.draw.choice(POINTS), _host(drill.victim)
    with Network(RANKS) as network, _start(drill, network, point, partial(network.set_link, host, "down", True), *PATIENT) as ranks:
        ranks.until(drill.mark.exists, SECONDS, "the fault")
        time.sleep(LOOSE)
        network.set_link(host, "up", True)
        _all_well(ranks)
    return drill.outcome(f"cable of rank {drill.victim} out for {LOOSE:g} s, round {drill.number}, {point}", None)


def slow_link(drill: Drill) -> Outcome:
    """A link becomes fifty times slower, with a queue that makes frames wait, or with one that drops them: nothing is lost."""
    fate, point, host = drill.draw.choice(list(QUEUES)), drill.draw.choice(POINTS), _host(drill.victim)
    with Network(RANKS) as network:
        with _start(drill, network, point, partial(network.shape, host, RATE, BURST, QUEUES[fate]), *HEALING) as ranks:
            _all_well(ranks)
        dropped = network.dropped(host)
    assert drill.mark.exists()
    where = f"link of rank {drill.victim} at {RATE[:-4]} Mbit/s, round {drill.number}, {point}"
    return drill.outcome(f"{where}; what is too much {fate} ({dropped} frames dropped)", None)


def lacking() -> str:
    """Return why these faults cannot be played here, nothing where they can."""
    missing = ["root"] * (os.geteuid() != 0) + [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"needs {' '.join(missing)}"
    name = f"probe-{secrets.token_hex(3)}"
    try:
        output(["ip", "netns", "add", name])
        output(["ip", "-n", name, "link", "add", "br0", "type", "bridge"])
    except AssertionError as error:
        return f"no network namespaces here: {str(error).splitlines()[-1]}"
    finally:
        with suppress(AssertionError):
            output(["ip", "netns", "delete", name])
    return ""


def _host(rank: int) -> int:
    return rank + 1


def _start(drill: Drill, network: Network, point: str, deed: Deed, *settings: str) -> Ranks:
    """Start the ranks on their hosts; the victim does ``deed`` at a point of the drill's round."""
    victim = sabotage.at(point, drill.number, deed, drill.mark)
    saboteurs = {rank: _on_host(network, rank, victim if rank == drill.victim else None) for rank in range(RANKS)}
    return drill.start(saboteurs, *settings, environ=ENVIRON)


def _on_host(network: Network, rank: int, then: Saboteur | None) -> Saboteur:
    def saboteur() -> None:
        network.enter(_host(rank))
        os.environ["LOCAL_RANK"] = "0"
        if then:
            then()

    return saboteur


def _all_well(ranks: Ranks) -> None:
    codes = ranks.wait(SECONDS)
    assert not any(codes.values()), f"exit codes {codes}, should be 0"


FAULTS: dict[str, Fault] = {"dropped link": drop_link, "loose link": loose_link, "slow link": slow_link}
