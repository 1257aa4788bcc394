"""One drill: the run that is disturbed, the folder that it leaves, and what has to come of it."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drill.ranks import STEP, Job, Ranks, Saboteur

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "tiny.yaml")
RANKS, ROUNDS, CLIENTS = 5, 10, 4
PATIENCE = 8.0  # seconds of silence that count as death, where a rank stands still
SECONDS = 120.0  # of one job: a hang fails here
SETTINGS = (
    f"clients.count={CLIENTS}", f"clients.per_round={CLIENTS}", "clients.steps=1", "clients.batch_size=8", "data.limit=80",
    "data.test_limit=16", "method.sparse.rounds=5", "method.lowrank.rounds=5", "server.momentum=0.5",
)  # fmt: skip
HEALING = ("clients.min_clients=2",)
PATIENT = (*HEALING, f"comm.client_timeout={PATIENCE:g}")
SECRET = {"SLORA_DIST_SECRET": "of the drill, and of nobody else"}


@dataclass(frozen=True)
class Outcome:
    """What came of a fault: seconds until somebody said so, finished rounds that are missing or double, whether the bits are right, and
    whether ``slora-dist audit`` finds the run's files in order.
    """

    injected: str
    noticed: float | None
    lost: int
    equal: bool
    audited: bool


class Drill:
    """One fault in a folder of its own; ``references`` holds the runs that results are compared with."""

    def __init__(self, folder: Path, references: Path, seed: int) -> None:
        self.folder, self.references, self.draw = folder, references, random.Random(seed)
        self.run, self.log, self.mark = folder / "run", folder / "log", folder / "injected"
        folder.mkdir(parents=True)
        self.log.touch()
        self.number = self.draw.randrange(2, ROUNDS + 1)
        self.victim = self.draw.randrange(1, RANKS)

    @property
    def client(self) -> int:
        """The client that lives on the victim."""
        return self.victim - 1

    def train(self, *settings: str) -> list[str]:
        """Return the arguments of ``slora-dist`` that start the run."""
        return ["train", CONFIG, *SETTINGS, *settings, "--out", str(self.run)]

    def start(self, saboteurs: Mapping[int, Saboteur], *more: str, environ: Mapping[str, str] | None = None) -> Ranks:
        """Start the job over gloo."""
        return Ranks(RANKS, self.train("comm.backend=gloo", *more), self.log, {**SECRET, **(environ or {})}).start(saboteurs)

    def said(self, words: Sequence[str]) -> bool:
        """Whether the log has one of ``words``."""
        return any(word in self.log.read_text(encoding="utf-8") for word in words)

    def noticed(self, job: Job, words: Sequence[str]) -> float:
        """Return the seconds from the fault until the log has one of ``words``."""
        job.until(self.mark.exists, SECONDS, "the fault")
        job.until(lambda: self.said(words), SECONDS, f"{words} in the log")
        return self.since()

    def since(self) -> float:
        """Return the seconds from the fault until now, as seen by who looks in steps."""
        return max(0.0, time.monotonic() - float(self.mark.read_text(encoding="utf-8")) - STEP)

    def resume(self, size: int) -> None:
        """Play the rest on ``size`` ranks over gloo."""
        with Ranks(size, ["train", "--resume", str(self.run)], self.log).start() as ranks:
            ended = ranks.wait(SECONDS)
            assert set(ended.values()) == {0}, f"{ended}\n{self.log.read_text(encoding='utf-8')[-3000:]}"

    def outcome(self, injected: str, noticed: float | None, *planned: str) -> Outcome:
        """Compare the finished run with one that was ``planned`` so."""
        numbers = [json.loads(line)["round"] for line in (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        lost = len(set(range(1, ROUNDS + 1)) - set(numbers)) + len(numbers) - len(set(numbers))
        equal = _bits(self.run) == _bits(self.reference(*planned))
        with Ranks(1, ["audit", str(self.run)], self.log).start() as auditor:
            return Outcome(injected, noticed, lost, equal, auditor.wait(SECONDS) == {0: 0})

    def reference(self, *planned: str) -> Path:
        """Return an undisturbed run with these settings, played once by a world of one."""
        name = "undisturbed" + "".join(character if character.isalnum() else "-" for character in "".join(planned))
        run = self.references / name
        if not (run / "summary.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            log = self.references / f"{name}.log"
            log.touch()
            with Ranks(1, ["train", CONFIG, *SETTINGS, *planned, "--out", str(run)], log).start() as ranks:
                assert ranks.wait(SECONDS) == {0: 0}, log.read_text(encoding="utf-8")
        return run


Fault = Callable[[Drill], Outcome]


def away(clients: Mapping[int, Sequence[int]]) -> str:
    """Return the setting by which clients are away: {client: [from round, to round]}, to the end where the second is missing."""
    return "clients.away={" + ", ".join(f"{client}: {list(rounds)}" for client, rounds in clients.items()) + "}"


def payload(run: Path) -> Counter[tuple[int, str, str]]:
    """Return the bytes that a run's ledger has by round, direction and kind, without control."""
    sums: Counter[tuple[int, str, str]] = Counter()
    for line in map(json.loads, (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()):
        for kind, nbytes in line["bytes_by_kind"].items() if line["direction"] in ("up", "down") else ():
            sums[line["round"], line["direction"], kind] += nbytes
    return sums


def _bits(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
