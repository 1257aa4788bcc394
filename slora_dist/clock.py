"""One clock for all ranks: what each rank's monotonic clock lacks to Unix time on rank 0's.

Ranks on one machine share the monotonic clock. To another machine rank 0 sends a question and takes the answer as given halfway between
(Cristian's algorithm); of several tries the quickest counts, and half its round trip bounds the error.
"""

import struct
import time
from collections.abc import Iterator

from torch import Tensor

from slora_dist.agreement import gather_bytes, tell
from slora_dist.comm.metered import Metered
from slora_dist.counters import machine
from slora_dist.ledger import Label
from slora_dist.wire import as_bytes

TRIES = 5
_CLOCK = struct.Struct("<d")
_LABEL = Label("start", 0, "control", {"clock": 8})


def synchronize(comm: Metered) -> tuple[dict[int, float], float]:
    """Return on rank 0 ({rank: seconds to add to its ``perf_counter``}, bound of the error in seconds); elsewhere nothing of use."""
    own = time.time() - time.perf_counter()
    machines = gather_bytes(comm, machine().encode(), Label("start", 0, "control", {"machine": 0}))
    first = {name: rank for rank, name in reversed(machines.items())}
    speakers = tell(comm, [first[name] for name in machines.values()] or [0] * len(comm.members), _wide(len(comm.members)))
    lacks, error = {0: 0.0}, 0.0
    for speaker in sorted(set(speakers) - {0}):
        lacks[speaker], bound = min((_ask(comm, speaker) for _ in range(TRIES)), key=lambda answer: answer[1])
        error = max(error, bound)
    return {rank: own + lacks[speaker] for rank, speaker in zip(comm.members, speakers, strict=True)}, error


def _wide(size: int) -> Label:
    return Label("start", 0, "control", {"machine": 8 * size})


def _ask(comm: Metered, speaker: int) -> tuple[float, float]:
    """Return on rank 0 what the speaker's clock lacks to rank 0's, and half the round trip."""
    sent = time.perf_counter()
    tell(comm, [0], _LABEL)
    theirs = 0.0
    for _, _, chunk_b in comm.gather(_stamp() if comm.rank == speaker else [], [speaker], _LABEL, 8):
        (theirs,) = _CLOCK.unpack(chunk_b.numpy().tobytes())
    received = time.perf_counter()
    return (sent + received) / 2 - theirs, (received - sent) / 2


def _stamp() -> Iterator[Tensor]:
    """Yield this rank's clock as it is when the message is asked for."""
    yield as_bytes(_CLOCK.pack(time.perf_counter()))
