"""The model on the clients' own held-out documents: its offset goes to all of them, each judges it with what it keeps, and answers.

Legend: N coordinates.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from slora_dist import personal
from slora_dist.evaluate import tally
from slora_dist.roundplan import home, present
from slora_dist.rounds import training
from slora_dist.rounds.seat import Seat
from slora_dist.stage import Stage
from slora_dist.wire import as_bytes


def ask(seat: Seat, stage: Stage, number: int) -> Tensor:
    """Bring the offset after round ``number`` to all clients that are there, in the number format of the wire down."""
    seat.where.operation = "evaluate"
    wire = stage.exchange.whole.down
    label = stage.label(number, "control", {"evaluation": wire.nbytes})
    return seat.send_down(wire, stage.server.offset_N if stage.server else None, label, len(_own(seat, number)))


def collect(seat: Seat, stage: Stage, number: int, offset_N: Tensor) -> dict[str, Any]:
    """Let this rank's clients judge ``offset_N`` and bring all answers to rank 0; returns there what the record says of them."""
    clients = present(seat.config, number, seat.comm.size, seat.comm.members)
    senders = [home(client, seat.comm.size) for client in clients]
    label = stage.label(number, "control", {"score": personal.SCORE_BYTES})
    answers = seat.comm.gather(_answers(seat, stage, number, offset_N), senders, label, personal.SCORE_BYTES)
    tallies = [personal.unpack(answer_B.numpy().tobytes()) for _, _, answer_B in answers]
    return personal.figures(tallies, seat.config.model.task)


def _own(seat: Seat, number: int) -> list[int]:
    clients = present(seat.config, number, seat.comm.size, seat.comm.members)
    return [client for client in clients if home(client, seat.comm.size) == seat.comm.rank]


def _answers(seat: Seat, stage: Stage, number: int, offset_N: Tensor) -> Iterator[Tensor]:
    for client in _own(seat, number):
        seat.where.operation = f"evaluation of client {client}"
        with seat.journal.span("evaluate", stage.name, number, client):
            state = seat.states.load(client, number + 1) if seat.config.keeps_state else {}
            own_N = training.as_held(stage, client, offset_N, state)
            stage.coordinates.write(seat.net, stage.reference_N + own_N.to(seat.device))
            answer = personal.pack(tally(seat.net, seat.federation.held_out(client), seat.pad))
        yield as_bytes(answer)
