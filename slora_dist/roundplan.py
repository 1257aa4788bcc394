"""Who trains where in a round: a pure function of (seed, round), computed alike on every rank and never sent."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from slora_dist.config import Config
from slora_dist.data.permutation import permutation
from slora_dist.errors import ConfigError
from slora_dist.seeding import derive


@dataclass(frozen=True)
class RoundPlan:
    """The sampled clients in ascending order, and the rank that plays each."""

    clients: tuple[int, ...]
    ranks: tuple[int, ...]

    def played_by(self, rank: int) -> list[int]:
        """Return the clients that ``rank`` plays, in order."""
        return [client for client, player in zip(self.clients, self.ranks, strict=True) if player == rank]

    def only(self, clients: Collection[int]) -> "RoundPlan":
        """Return the plan of some of its clients."""
        chosen = [(client, rank) for client, rank in zip(self.clients, self.ranks, strict=True) if client in clients]
        return RoundPlan(tuple(client for client, _ in chosen), tuple(rank for _, rank in chosen))


def workers(size: int) -> range:
    """Return the ranks that play clients: all but rank 0, which in a world of one plays everybody."""
    return range(1, size) if size > 1 else range(1)


def home(client: int, size: int) -> int:
    """Return the rank that answers for a client over a whole run: it opens the client's own file."""
    return workers(size)[client % len(workers(size))]


def lost(config: Config, size: int, members: Sequence[int]) -> set[int]:
    """Return the clients of ranks that have died: those that live on none of the ``members`` of ``size`` ranks."""
    here = set(members)
    return {client for client in range(config.clients.count) if home(client, size) not in here} if len(here) < size else set()


def absent(config: Config, number: int, size: int, members: Sequence[int]) -> set[int]:
    """Return the clients that are not there in round ``number``: those of ranks that have died, and those that are away as planned."""
    return lost(config, size, members) | config.clients.away_in(number)


def present(config: Config, number: int, size: int, members: Sequence[int]) -> list[int]:
    """Return all clients that are there in round ``number``, ascending."""
    gone = absent(config, number, size, members)
    return [client for client in range(config.clients.count) if client not in gone]


def sample(config: Config, number: int, gone: Collection[int] = ()) -> tuple[int, ...]:
    """Return the clients of round ``number`` (from 1), ascending: K of N without those who are ``gone``, uniform, without replacement."""
    count = config.clients.count
    order = range(count) if config.sampled == count else _order(count, derive(config.run.seed, "sample", number))
    return tuple(sorted([client for client in order if client not in gone][: config.sampled]))


@lru_cache(maxsize=2)  # a round is planned, and its messages are: each asks for the sample
def _order(count: int, seed: int) -> list[int]:
    order: list[int] = permutation(count, seed).tolist()
    return order


def plan_round(config: Config, number: int, size: int, examples: Sequence[int] | None, members: Sequence[int] | None = None) -> RoundPlan:
    """Plan round ``number`` (from 1) for ``size`` ranks, of which ``members`` are left.

    With ``examples`` (documents of each client) the clients are spread so that the most loaded rank has little more than its share:
    the largest first, each to the least loaded rank. A client whose file or state is only there stays at its home.
    """
    clients = sample(config, number, absent(config, number, size, range(size) if members is None else members))
    if config.at_home or examples is None:
        return RoundPlan(clients, tuple(home(client, size) for client in clients))
    ranks = dict(zip(clients, workers(size), strict=False)) if len(clients) <= len(workers(size)) else _spread(clients, size, examples)
    return RoundPlan(clients, tuple(ranks[client] for client in clients))


def check_world(config: Config, size: int) -> None:
    """Raise ``ConfigError`` when there are more worker ranks than clients in a round: some would never train.

    So it does where real messages stand for those of the clients: several on one rank would queue.
    """
    busy = config.clients.count if config.at_home else config.sampled
    setting = "clients.count" if config.at_home else "clients.per_round"
    if len(workers(size)) > busy:
        raise ConfigError(
            setting, f"{busy} clients cannot occupy {size - 1} worker ranks", f"1 to {busy + 1} ranks: a server and its workers"
        )
    if config.network.mode == "sleep" and size <= busy:
        problem = f"sleep with {busy} clients on {max(1, size - 1)} worker rank(s)"
        raise ConfigError("network.mode", problem, f"virtual, or {busy + 1} ranks: a server and one for each client")


def _spread(clients: Sequence[int], size: int, examples: Sequence[int]) -> dict[int, int]:
    load = dict.fromkeys(workers(size), 0)
    ranks = {}
    for client in sorted(clients, key=lambda client: (-examples[client], client)):
        rank = min(load, key=lambda rank: (load[rank], rank))
        ranks[client] = rank
        load[rank] += examples[client]
    return ranks
