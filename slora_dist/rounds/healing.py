"""What ranks do when one of them dies: form a new group, go back to the last finished round, and play the next one with those who are left.

It is a resumption within the process. Nothing is trained twice: a client's update of the round that broke is kept, and sent again.
"""

from slora_dist.errors import RunError, TransportError
from slora_dist.log import say
from slora_dist.roundplan import absent, home
from slora_dist.rounds.seat import Seat
from slora_dist.runfolder import Checkpoint


def heal(seat: Seat, error: TransportError) -> Checkpoint | None:
    """Bring this rank into the next group, with all that it holds as it was at the beginning; return rank 0's last checkpoint.

    Raises ``error`` where ranks do not heal, and ``RunError`` when this rank is on its own or fewer than ``clients.min_clients`` are left.
    """
    if seat.group is None:
        raise error
    number = seat.where.round
    if seat.is_root:
        say(0, f"{seat.where}: {error}; waiting for the others")
    seat.where.operation = "regroup"
    while True:
        try:
            seat.group.regroup()
            break
        except TransportError:  # somebody else has died meanwhile: only so often can this happen
            continue
    if seat.sealed and seat.group.generations:
        seat.sealed.restart(seat.group.generations.number)
    _enough(seat, number)
    seat.comm.ledger.break_off()
    seat.start_over()
    if not seat.is_root:
        return None
    seat.folder.wait()
    checkpoint = seat.folder.latest()
    done = checkpoint.values["round"] if checkpoint else 0
    _note(seat, done + 1)
    seat.folder.rewind(done if checkpoint else -1, bool(checkpoint and checkpoint.values["unjudged"]))
    say(0, f"going on with ranks {', '.join(map(str, seat.comm.members))} from round {done + 1}")
    return checkpoint


def _note(seat: Seat, number: int) -> None:
    """Note whom the run has lost in round ``number``."""
    assert seat.group and seat.group.generations
    for loss in seat.group.generations.losses[len(seat.lost) :]:
        clients = [client for client in range(seat.config.clients.count) if home(client, seat.comm.size) == loss.rank]
        seat.lost.append({"rank": loss.rank, "round": number, "clients": clients, "reason": loss.reason})


def missing(seat: Seat, number: int) -> dict[str, list[int]]:
    """Return the ranks and clients that are not there in round ``number``."""
    ranks = sorted(set(range(seat.comm.size)) - set(seat.comm.members))
    return {"ranks": ranks, "clients": sorted(absent(seat.config, number, seat.comm.size, seat.comm.members))}


def _enough(seat: Seat, number: int) -> None:
    left = seat.config.clients.count - len(missing(seat, number)["clients"])
    least = seat.config.clients.min_clients or 1
    if left < least:
        raise RunError(f"{left} clients are left, clients.min_clients is {least}: --resume goes on when all ranks are there")
