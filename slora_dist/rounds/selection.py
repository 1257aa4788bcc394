"""How a phase comes by masks that follow the clients' gradients, before it begins: scores up, the mask down, once.

Legend: B bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slora_dist import upload
from slora_dist.aggregate.server import take
from slora_dist.fisher import Selection, score
from slora_dist.ledger import Label
from slora_dist.log import say
from slora_dist.roundplan import plan_round
from slora_dist.rounds.seat import Seat
from slora_dist.seeding import derive
from slora_dist.support import Part
from slora_dist.upload import Upload
from slora_dist.wire import Header


def choose(seat: Seat, at: int, name: str, number: int, selection: Selection) -> Tensor:
    """Return the mask of phase ``at`` (uint8 of length B): clients of its first round, ``number``, score all entries, rank 0 chooses."""
    seat.where.operation = "choice of the mask"
    plan = plan_round(seat.config, number, seat.comm.size, seat.federation.sizes, seat.comm.members)
    seat.network.begin(plan, number)
    phase = seat.phases[at]
    assert phase.kind == "sparse"
    drawn = {client: min(phase.mask_documents, seat.federation.trains_on(client)) for client in plan.clients}
    expected = [Header(client, at, number, drawn[client], 0.0, 0.0, selection.wire.nbytes) for client in plan.clients]
    by_examples = seat.config.server.weighting == "examples"
    job = Upload(selection.wire, Label(name, number, "up", selection.up), expected, plan.ranks, by_examples)
    received = upload.gather(seat.comm, job, _scores(seat, at, number, plan.played_by(seat.comm.rank), selection))
    mask_B = torch.empty(sum(selection.down.values()), dtype=torch.uint8)
    if received:
        support = selection.wire.support
        mask_B = selection.choose(upload.joined([(Part(support, None), received)], support.numel).mean_N)
    seat.comm.broadcast(mask_B, Label(name, number, "down", selection.down), seat.hosted)
    return mask_B


def resend(seat: Seat, name: str, number: int, selection: Selection, mask_B: Tensor | None) -> Tensor:
    """Bring the mask, which is rank 0's after a run is resumed, to all ranks."""
    empty_B = torch.empty(sum(selection.down.values()), dtype=torch.uint8)
    mask_B = take({} if mask_B is None else {"mask": mask_B}, "mask", empty_B) if seat.is_root else empty_B
    seat.comm.broadcast(mask_B, Label(name, number, "control", selection.down), clients=1)
    return mask_B


def _scores(seat: Seat, at: int, number: int, clients: list[int], selection: Selection) -> Iterator[tuple[Header, Tensor]]:
    phase = seat.phases[at]
    assert phase.kind == "sparse"
    for client in clients:
        seed = derive(seat.config.run.seed, "scores", client)
        documents = seat.federation.client(client)
        update = score(seat.net, selection.scores, documents, phase.mask_documents, seat.pad, seed)
        if update.reason:
            say(seat.comm.rank, f"client {client} is left out of the choice of the mask: {update.reason} ({update.cause})")
        told = (update.num_examples, update.loss, update.seconds)
        yield Header(client, at, number, *told, selection.wire.nbytes, reason=update.reason), update.delta_N
