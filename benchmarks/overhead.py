"""What a round costs beside training: our whole round against the bare collectives that move the same bytes, in the same job.

Five ranks, four clients, a network of MiniLM's shape; training is replaced by a constant update. Our round is all that ``Session`` does:
broadcast, gather, mean, server step, ledger and kernel counters of all ranks, checkpoint. (It is written beside the next round's
training: only its CPU seconds count.) The bare round is a broadcast and a gather by the transport itself (``torch.distributed`` on gloo,
mpi4py) and nothing else. Both are played in turn.

Legend: B bytes.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RUNS, Row, middle, ratio
from benchmarks.jobs import CLIENTS, MINILM, RANKS, join, on_ranks, session, tell

SHARED = (f"model.config={MINILM}", f"clients.count={CLIENTS}", "clients.per_round=null", "server.eval_every=0", "data.test_limit=8")
METHODS = {
    "fft": ("method.name=fft", f"method.dense.rounds={RUNS + 2}"),
    "lora": ("method.name=lora", "method.lowrank.rank=8", "method.lowrank.targets=[query, value]", f"method.lowrank.rounds={RUNS + 2}"),
}
NAMES = {"fft": "all parameters (91 MB)", "lora": "LoRA r 8 on query and value (0.33 MB)"}
TARGETS = {"fft": 1.25, "lora": 1.5}
Play = Callable[[], object]


def play(transport: str, folder: str, method: str) -> None:
    """Play both kinds of round on this rank, and leave its seconds in ``folder``."""
    comm = join(transport)
    held, rounds = session(comm, folder, (*SHARED, *METHODS[method]))

    def ours() -> tuple[float, float, int]:
        return timed(comm, lambda: next(rounds), held.folder.wait)

    taken: dict[str, list[tuple[float, float, int]]] = {"ours": [ours()], "bare": []}
    nbytes = message_bytes(held)
    alone = bare(transport, nbytes)
    for _ in range(RUNS):
        taken["bare"].append(timed(comm, alone))
        taken["ours"].append(ours())
    tell(folder, comm.rank, {"nbytes": nbytes, **taken})
    comm.close()


def message_bytes(held: Any) -> int:
    """Return the bytes of one message of a session's phase."""
    from slora_dist import methods
    from slora_dist.wire import Wire

    (phase,) = held.config.method.resolved()
    return Wire(methods.support(phase, held.seat.classifier, held.config.method, held.config.run.seed), "float32", "implicit").nbytes


def timed(comm: Any, step: Play, behind: Play = lambda: None) -> tuple[float, float, int]:
    """Return wall and CPU seconds of this rank, and the bytes that the loopback interface has seen when all ranks are done.

    ``behind`` waits for what goes on beside the next round's training: its CPU seconds count, its wall seconds do not.
    """
    comm.barrier()
    wall, cpu, loopback = time.perf_counter(), time.process_time(), seen()
    step()
    wall = time.perf_counter() - wall
    behind()
    cpu = time.process_time() - cpu
    comm.barrier()
    return wall, cpu, seen() - loopback


def seen() -> int:
    """Return the bytes that came in on the loopback interface."""
    return int(Path("/sys/class/net/lo/statistics/rx_bytes").read_text())


def bare(transport: str, nbytes: int) -> Play:
    """Return a broadcast and a gather of messages of ``nbytes`` by the transport itself."""
    down_B, up_B = torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    return _bare_mpi(down_B, up_B) if transport == "mpi" else _bare_gloo(down_B, up_B)


def _bare_gloo(down_B: Tensor, up_B: Tensor) -> Play:
    import torch.distributed as dist

    parts = [torch.empty_like(up_B) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None

    def step() -> None:
        dist.broadcast(down_B, 0)
        dist.gather(up_B, parts, 0)

    return step


def _bare_mpi(down_B: Tensor, up_B: Tensor) -> Play:
    from mpi4py import MPI

    ranks = MPI.COMM_WORLD
    parts_B = torch.empty(ranks.Get_size() * up_B.numel(), dtype=torch.uint8).numpy() if ranks.Get_rank() == 0 else None

    def step() -> None:
        ranks.Bcast(down_B.numpy(), 0)
        ranks.Gather(up_B.numpy(), parts_B, 0)

    return step


def measure(transport: str, method: str) -> list[Row]:
    """Return the rows of one transport and one size of message."""
    told = on_ranks(transport, RANKS, "benchmarks.overhead", method)
    pairs = {"ours": slice(1, None), "bare": slice(None)}  # the first round of ours opens connections
    wall = {kind: [wall for wall, _, _ in told[0][kind][span]] for kind, span in pairs.items()}
    cpu = {
        kind: [sum(rank[1] for rank in step) for step in zip(*(one[kind][span] for one in told), strict=True)]
        for kind, span in pairs.items()
    }
    name, target, against = f"overhead: {transport}, {NAMES[method]}", TARGETS[method], "bare broadcast + gather"
    found = [
        Row(
            f"{name}, {clock}",
            ratio(taken["ours"], taken["bare"]),
            target,
            1.0,
            RUNS,
            against,
            {f"{k} s": middle(v) for k, v in taken.items()},
        )
        for clock, taken in (("wall", wall), ("CPU of all ranks", cpu))
    ]
    if transport == "gloo":  # MPI moves bytes through shared memory here, which no counter sees
        star = 2 * CLIENTS * told[0]["nbytes"]
        moved = {kind: middle([float(step[2]) for step in told[0][kind][span]]) / star for kind, span in pairs.items()}
        found.append(Row(f"{name}, bytes on the wire", moved["ours"], 1.05, 1.0, RUNS, "two messages a client", {"bare": moved["bare"]}))
    return found


def rows() -> list[Row]:
    """Return the rows of both transports and both sizes."""
    return [row for transport in ("gloo", "mpi") for method in METHODS for row in measure(transport, method)]


if __name__ == "__main__":
    play(sys.argv[1], sys.argv[2], sys.argv[3])
