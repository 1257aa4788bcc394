"""Where rank 0 listens for the others: for the store in which they meet, and for their lifelines."""

import errno
import ipaddress
import socket

from slora_dist.comm.base import INIT_SECONDS
from slora_dist.comm.lifeline import Healing, RankLifeline
from slora_dist.comm.root_lifeline import RootLifeline
from slora_dist.errors import ConfigError, RootGone
from slora_dist.world import World

BACKLOG = 1024  # ranks that may knock at the same moment


def listen(host: str, port: int, world: World) -> int:
    """Return the descriptor of a socket that listens at ``host`` alone: left to itself a store listens at all addresses of its machine.

    Only where that would shut ranks out it listens at all of them: when others are elsewhere and the name leads rank 0 to its own loopback
    (as Debian's 127.0.1.1 does), or when the address is that of a relay in front of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise RuntimeError(f"cannot listen at {host}: the name leads nowhere ({error}); MASTER_ADDR says another") from None
    own = ipaddress.ip_address(address[0])
    try:
        if world.size > world.local_size and own.is_loopback:
            return _listen_at("", port, family)
        return _listen_at(str(own), port, family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise RuntimeError(f"cannot listen at {host}:{port} ({error.strerror})") from None
        return _listen_at("", port, family)


def _listen_at(address: str, port: int, family: int) -> int:
    return socket.create_server((address, port), family=family, backlog=BACKLOG).detach()


def serve_lifeline(host: str, world: World, healing: Healing) -> RootLifeline:
    """Return rank 0's end of the lifeline, which listens at ``host`` and a port of the system's choice."""
    return RootLifeline(socket.socket(fileno=listen(host, 0, world)), world.size, healing)


def reach_lifeline(host: str, port: str, world: World, healing: Healing) -> RankLifeline:
    """Return another rank's end; raises ``RootGone`` where rank 0 cannot be reached, ``ConfigError`` where it refuses this rank."""
    try:
        return RankLifeline(host, int(port), world.rank, healing, INIT_SECONDS)
    except ConfigError:  # rank 0 has said why it refuses this rank
        raise
    except (OSError, ValueError) as error:
        raise RootGone(f"rank {world.rank}: connect with rank 0 failed: no lifeline at {host}:{port[:8]!r} ({error})") from error
