"""What the accounts cost: rank 0's seconds for taking, collecting, comparing and writing all ranks' notes, against the round around them.

The round is a short one: LoRA on a network of MiniLM's shape, four local steps of 16 documents a client, four clients on four ranks.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.common import RUNS, Row, middle, ratio
from benchmarks.jobs import RANKS, join, on_ranks, session, tell
from benchmarks.overhead import METHODS, SHARED

LOCAL = ("clients.steps=4", "clients.batch_size=16", "data.max_length=64")


class Stopwatch:
    """Adds up the seconds spent inside the functions that it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
        """Count the calls of ``owner.name`` whose arguments ``counts`` accepts."""
        inner = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += (time.perf_counter() - began) * counts(*args, **kwargs)

        setattr(owner, name, measured)

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def play(transport: str, folder: str) -> None:
    """Play rounds on this rank and leave what its accounts and its rounds took."""
    from slora_dist.journal import Journal
    from slora_dist.ledger import Ledger
    from slora_dist.rounds import session as module
    from slora_dist.runfolder import RunFolder

    comm, watch = join(transport), Stopwatch()
    watch.around(module, "gather_bytes", lambda _, mine, label: "ledger" in label.by_kind)
    watch.around(module, "settle")
    watch.around(Journal, "take")
    watch.around(Ledger, "add")
    watch.around(RunFolder, "append")
    _, played = session(comm, folder, (*SHARED, *METHODS["lora"], *LOCAL), trained=True)
    taken: dict[str, list[float]] = {"accounts": [], "round": []}
    for _ in range(RUNS + 1):
        comm.barrier()
        began = time.perf_counter()
        watch.take()
        next(played)
        taken["round"].append(time.perf_counter() - began)
        taken["accounts"].append(watch.take())
    tell(folder, comm.rank, {name: seconds[1:] for name, seconds in taken.items()})
    comm.close()


def rows() -> list[Row]:
    """Return the row of the accounts."""
    root = on_ranks("gloo", RANKS, "benchmarks.ledger")[0]
    beside = {"ms": 1e3 * middle(root["accounts"]), "round s": middle(root["round"])}
    return [Row("ledger: share of a short round", ratio(root["accounts"], root["round"]), 0.01, 0.0, RUNS, "the whole round", beside)]


if __name__ == "__main__":
    play(sys.argv[1], sys.argv[2])
