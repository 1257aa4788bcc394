"""The runs of a study: each cell a run folder and a process of its own; what is finished is skipped, what was stopped goes on."""

import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slora_dist.errors import ConfigError
from slora_dist.runfolder import RunFolder
from slora_dist.secret import FILE_VARIABLE, VARIABLE
from slora_dist.settings import require_equal
from slora_dist.study.grid import Cell, Study

State = Literal["new", "stopped", "finished"]


@dataclass(frozen=True)
class Played:
    """How a cell's process ended: its exit code and the last line that it said."""

    cell: Cell
    code: int
    said: str


def state(cell: Cell, out: Path) -> State:
    """Return how far a cell's run is. Raises ``ConfigError`` when its folder holds a run with other settings."""
    folder = RunFolder(out / cell.name)
    if not (folder.path / "config.json").exists():
        return "new"
    try:
        require_equal(folder.config(), cell.config)
    except ConfigError as error:
        allowed = f"the settings of the run in {folder.path}, another --out, or that folder deleted"
        raise ConfigError(f"{cell.name}: {error.setting}", error.problem, allowed) from None
    return "finished" if (folder.path / "summary.json").exists() else "stopped"


def command(study: Study, cell: Cell, out: Path, resume: bool) -> list[str]:
    """Return the command line that trains a cell, or goes on with it."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(study.ranks)] if study.ranks > 1 else []
    folder = str(out / cell.name)
    rest = ["--resume", folder] if resume else [str(study.base), *cell.overrides, "--out", folder]
    return [sys.executable, *start, "-m", "slora_dist", "train", *rest]


def listing(study: Study, out: Path) -> list[str]:
    """Return a line for each cell: its number, how far it is, and the command that is left to run."""
    lines = []
    for at, cell in enumerate(study.cells):
        now = state(cell, out)
        left = "" if now == "finished" else "  " + shlex.join(command(study, cell, out, now == "stopped"))
        lines.append(f"{at:3} {now:8} {cell.name}{left}")
    return lines


def make(out: Path) -> None:
    """Make the study's folder. Raises ``ConfigError`` when nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ConfigError("--out", f"{out} cannot be written ({error.strerror})", "a folder that you may write to") from None


def play(study: Study, out: Path, cells: Sequence[Cell], jobs: int, tell: Callable[[str], None]) -> int:
    """Run what is left of ``cells``, ``jobs`` at a time, and return how many failed. ``tell`` gets a line for each that ends."""
    states = {cell.name: state(cell, out) for cell in cells}
    left = [cell for cell in cells if states[cell.name] != "finished"]
    tell(f"{len(left)} of {len(cells)} runs to do")
    failed = 0
    executor = ThreadPoolExecutor(jobs)
    try:
        running = [executor.submit(_train, study, cell, out, states[cell.name] == "stopped") for cell in left]
        for number, future in enumerate(as_completed(running), 1):
            played = future.result()
            failed += played.code != 0
            tell(f"{number}/{len(left)} {played.cell.name}: " + (f"failed: {played.said}" if played.code else _result(played.cell, out)))
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt reaches the running ones as well, and must not start the next
    return failed


def _train(study: Study, cell: Cell, out: Path, resume: bool) -> Played:
    path = out / cell.name / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", errors="replace") as log:
        before = log.tell()
        words = command(study, cell, out, resume)
        code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environ(), check=False).returncode
        log.seek(before)
        return Played(cell, code, _last_words(log.read()) or f"exit code {code}")


def _environ() -> dict[str, str]:
    """Return the environment of a run: with a secret for its ranks, which nobody else holds, unless one is given."""
    given = any(os.environ.get(name) for name in (VARIABLE, FILE_VARIABLE))
    return dict(os.environ) | ({} if given else {VARIABLE: secrets.token_hex(32)})


def _last_words(text: str) -> str:
    """Return the last line that a rank said, and failing that the last line: torchrun has an epilogue of its own."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("slora-dist [rank")] or lines or [""])[-1]


def _result(cell: Cell, out: Path) -> str:
    summary = RunFolder(out / cell.name).summary()
    score = f"perplexity {summary['perplexity']:.2f}" if "perplexity" in summary else f"accuracy {summary['accuracy']:.2%}"
    return f"{score} in {summary['seconds']['total']:.0f} s"
