"""``python -m drill.soak [ROUNDS]``: a long run of the tiny model; memory, file descriptors and threads of every rank have to stay flat."""

import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import flwr_datasets.partitioner  # noqa: F401  # imported once, here: the ranks are forked from this process

import slora_dist.comm.torch_comm
import slora_dist.job  # noqa: F401
from drill.one import CONFIG, SECONDS
from drill.ranks import Ranks, Saboteur

RANKS, WARM = 4, 20  # rounds after which nothing may grow any more
WINDOW = 40  # rounds over which the least counts: a file that is open for a moment is no leak
GROWTH = 1.05
SETTINGS = (
    "clients.count=3", "clients.per_round=3", "clients.steps=1", "clients.batch_size=8", "data.limit=80", "data.test_limit=8",
    "server.eval_every=10", "comm.backend=gloo",
)  # fmt: skip


def main() -> int:
    """Play the run and print the figures; 1 when something grows."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    phases = (f"method.sparse.rounds={rounds // 2}", f"method.lowrank.rounds={rounds - rounds // 2}")
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)
        log = folder / "log"
        log.touch()
        arguments = ["train", CONFIG, *SETTINGS, *phases, "--out", str(folder / "run")]
        with Ranks(RANKS, arguments, log).start({rank: _watch(folder / f"rank-{rank}") for rank in range(RANKS)}) as ranks:
            codes = ranks.wait(SECONDS + rounds)
        assert set(codes.values()) == {0}, f"{codes}\n{log.read_text(encoding='utf-8')[-3000:]}"
        grown = [_grown(rank, folder / f"rank-{rank}") for rank in range(RANKS)]
    return int(any(grown))


def _watch(path: Path) -> Saboteur:
    """Note the figures of this rank at the beginning of every round."""

    def saboteur() -> None:
        from slora_dist.rounds import session

        play = session.Session._round

        def played(self: Any, stage: Any, number: int) -> Any:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_figures()) + "\n")
            return play(self, stage, number)

        session.Session._round = played  # type: ignore[method-assign]

    return saboteur


def _figures() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    return {"memory kB": int(status["VmRSS"].split()[0]), "descriptors": descriptors, "threads": threading.active_count()}


def _grown(rank: int, path: Path) -> bool:
    """Say what a rank had at least after the warm-up and what at the end; whether it is more than allowed."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    warm, last = _least(lines[WARM : WARM + WINDOW]), _least(lines[-WINDOW:])
    print(f"rank {rank}: " + ", ".join(f"{name} {warm[name]} -> {last[name]}" for name in warm))
    return last["memory kB"] > GROWTH * warm["memory kB"] or any(last[name] > warm[name] for name in ("descriptors", "threads"))


def _least(lines: list[dict[str, int]]) -> dict[str, int]:
    return {name: min(line[name] for line in lines) for name in lines[0]}


if __name__ == "__main__":
    sys.exit(main())
