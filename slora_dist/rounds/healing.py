"""What ranks do when one of them dies: form a new group, go back to the last finished round, and play the next one with those who are left.

It is a resumption within the process. Nothing is trained twice: a client's update of the round that broke is kept, and sent again,
unless the phase begins anew with another mask.
"""

from slora_dist.comm.mpi_comm import MpiComm
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.errors import RunError, TransportError
from slora_dist.log import say
from slora_dist.roundplan import absent, home
from slora_dist.rounds.seat import Seat
from slora_dist.runfolder import Checkpoint

BREAKS = 5  # times that a round may break and be played again though no rank is gone


def heal(seat: Seat, error: TransportError) -> Checkpoint | None:
    """Bring this rank into the next group, with all that it holds as it was at the beginning; return rank 0's last checkpoint.

    Raises ``error`` where ranks do not heal, and ``RunError`` when this rank is on its own, when those who are left cannot form a group,
    or when they are fewer than ``clients.min_clients``.
    """
    if seat.group is None:
        raise error
    operation = seat.where.operation
    if seat.is_root:
        say(0, f"{seat.where}: {error}; waiting for the others")
    seat.where.operation = "regroup"
    regroup(seat.group)
    if seat.sealed and seat.group.generations:
        seat.sealed.restart(seat.group.generations.number)
    seat.comm.ledger.break_off()
    seat.start_over()
    if not seat.is_root:
        return None
    seat.folder.wait()
    checkpoint = seat.folder.latest()
    done = checkpoint.values["round"] if checkpoint else 0
    _note(seat, done + 1)
    enough(seat, done + 1)
    seat.where.operation = operation
    _bear(seat, done + 1, error)
    seat.folder.rewind(done if checkpoint else -1, bool(checkpoint and checkpoint.values["unjudged"]))
    say(0, f"going on with ranks {', '.join(map(str, seat.comm.members))} from round {done + 1}")
    return checkpoint


def regroup(group: TorchComm | MpiComm) -> None:
    """Form the next group. One may die while it is formed, and then it is tried again; rank 0 gives up where it fails and all live."""
    assert group.generations
    failed, lost = 0, len(group.generations.losses)
    while True:
        try:
            group.regroup()
            return
        except TransportError as error:
            now = len(group.generations.losses)
            failed, lost = 1 if now > lost else failed + 1, now
            if group.rank == 0 and failed >= group.size:
                problem = f"rank 0: {failed} groups in a row were not formed, and nobody is gone: can all ranks reach each other?"
                raise RunError(f"{problem} ({error})") from error


def _bear(seat: Seat, number: int, error: TransportError) -> None:
    """Count on rank 0 how often round ``number`` has broken in a group with nobody gone; raise when that will not end."""
    state = number, len(seat.lost), tuple(seat.comm.members)
    seat.breaks[state] += 1
    if seat.breaks[state] > BREAKS:
        look = f"see what the ranks say, whether all can reach each other, and comm.timeout ({seat.config.comm.timeout:g} s)"
        raise RunError(f"round {number} has broken {seat.breaks[state]} times, and no rank is gone: {look} ({error})") from error


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


def enough(seat: Seat, number: int) -> None:
    """Raise on rank 0 when round ``number`` cannot be played any more; who goes when all are played is not missed."""
    if number > sum(phase.rounds for phase in seat.phases):
        return
    left = seat.config.clients.count - len(missing(seat, number)["clients"])
    least = seat.config.clients.min_clients or 1
    if left < least:
        raise RunError(f"{left} clients are left, clients.min_clients is {least}: --resume goes on when all ranks are there")
