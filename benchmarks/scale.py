"""What grows with the number of clients, and what with the number of ranks.

The server's round at K = 4 sampled clients is played for few and for many clients that there are; the bytes through rank 0 and its CPU
seconds for one ``reduce`` are measured on few ranks and on more.
"""

import csv
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RUNS, Row, interleave, middle, ratio
from benchmarks.jobs import join, on_ranks, session, tell

FEW, MANY, SAMPLED = 100, 10_000, 4
SMALL_WORLD, LARGE_WORLD, NBYTES = 3, 9, 8 << 20


def documents(folder: Path) -> Path:
    """Write a source with a document for each of ``MANY`` clients."""
    folder.mkdir(exist_ok=True)
    path = folder / "documents.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([f"word{at % 50} word{at % 7}", at % 3] for at in range(MANY))
    return path


def federation(folder: str, count: int) -> Any:
    """Return the rounds of a federation of ``count`` clients, as a world of one."""
    from slora_dist.comm.alone import Alone

    source = documents(Path(folder))
    own = (f"data.limit={count}", "data.partition=iid")  # a document a client: what a client reads does not depend on how many there are
    data = (f"data.path={source}", f"data.test_path={source}", "data.test_limit=8", *own, "server.eval_every=0")
    method = ("method.name=lora", "method.lowrank.rounds=100")
    clients = (f"clients.count={count}", f"clients.per_round={SAMPLED}")
    return session(Alone(), f"{folder}/{count}", (*data, *method, *clients))[1]


def clients() -> list[Row]:
    """Return the rows of the number of clients."""
    with tempfile.TemporaryDirectory() as folder:
        played = {count: federation(folder, count) for count in (FEW, MANY)}
        taken = interleave({str(count): lambda rounds=rounds: next(rounds) for count, rounds in played.items()}, 2 * RUNS)
        memory = [float(subprocess.check_output([sys.executable, "-m", "benchmarks.scale", folder, str(count)])) for count in (MANY, FEW)]
    against, few, many = f"the same with {FEW}", taken[str(FEW)], taken[str(MANY)]
    times, sizes = {"ms": 1e3 * middle(many), f"ms of {FEW}": 1e3 * middle(few)}, {"MB": memory[0], f"MB of {FEW}": memory[1]}
    return [
        Row(f"scale: server's round, {MANY} clients, {SAMPLED} sampled", ratio(many, few), 1.2, 1.0, 2 * RUNS, against, times),
        Row(f"scale: server's memory, {MANY} clients, {SAMPLED} sampled", memory[0] / memory[1], 1.2, 1.0, 1, against, sizes),
    ]


def most_memory(folder: str, count: int) -> float:
    """Return the most MB that a process of its own ever had while it played rounds with ``count`` clients."""
    rounds = federation(f"{folder}/alone-{count}", count)
    for _ in range(RUNS):
        next(rounds)
    status = Path("/proc/self/status").read_text()  # getrusage's figure begins with that of the parent
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def play(transport: str, folder: str) -> None:
    """Reduce on this rank, and leave its CPU seconds and the bytes of its connections."""
    from slora_dist.counters import connections

    comm = join(transport)
    values = torch.ones(NBYTES // 4)
    comm.reduce(values)
    found: dict[str, list[float]] = {"cpu": [], "bytes": []}
    for _ in range(RUNS):
        comm.barrier()
        before, cpu = _through(connections()), time.process_time()
        comm.reduce(values)
        found["cpu"].append(time.process_time() - cpu)
        found["bytes"].append(_through(connections()) - before)
    tell(folder, comm.rank, found)
    comm.close()


def _through(connections: dict[str, dict[str, int]]) -> float:
    return float(sum(counts["sent_bytes"] + counts["received_bytes"] for counts in connections.values()))


def ranks() -> list[Row]:
    """Return the rows of the number of ranks."""
    root = {size: on_ranks("gloo", size, "benchmarks.scale")[0] for size in (SMALL_WORLD, LARGE_WORLD)}
    logarithm = math.log2(LARGE_WORLD) / math.log2(SMALL_WORLD)
    against, found = f"the same on {SMALL_WORLD} ranks", []
    for what, name in (("bytes", "bytes through rank 0"), ("cpu", "CPU of rank 0")):
        grown = middle(root[LARGE_WORLD][what]) / middle(root[SMALL_WORLD][what])
        found.append(Row(f"scale: reduce on {LARGE_WORLD} ranks, {name}", grown, logarithm, 1.0, RUNS, against))
    return found


def rows() -> list[Row]:
    """Return the rows of both."""
    return clients() + ranks()


if __name__ == "__main__":
    if sys.argv[1] == "gloo":
        play(sys.argv[1], sys.argv[2])
    else:
        print(most_memory(sys.argv[1], int(sys.argv[2])))
