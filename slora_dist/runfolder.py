"""The files of a run: settings, metrics, ledger, summary, checkpoints. Rank 0 alone writes them; ``--resume`` and ``export`` read them.

A checkpoint is a folder of its own, complete before the pointer ``latest`` names it; both renames are atomic, so a stop at any moment
leaves the last good state. So does a disk that is full: what cannot be written is a ``RunError`` that names the file.
"""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slora_dist.config import Config
from slora_dist.disk import replace, sync, writing
from slora_dist.errors import ConfigError, RunError
from slora_dist.settings import validate

CHECKSUM = "state.sha256"  # of the other files of a checkpoint
FINISH_SECONDS = 20.0  # SLURM and torchrun kill a process 30 seconds after they have asked it to leave
SUMS = "sums"  # a line for each sum of updates that was taken under noise, those of rounds that were played again, too
LOSS = {"rank", "round", "clients", "reason"}  # of a rank that has died: what is told of it
RECORDS = ("metrics", "ledger", "timeline", "counters")  # one line a round, a collective, a span of time, a process and round
RUN = "the folder of a run"
LIBRARIES = ("slora_dist", "torch", "transformers", "peft", "datasets", "numpy", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round: tensors, and plain values (``round``, ``phase``, ``switch``, ...)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class RunFolder:
    """One run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self._created = False
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def create(self, config: Config, world: Mapping[str, Any]) -> None:
        """Make the folder with its ``config.json``. Raises ``ConfigError`` when a run is there already, or it cannot be written."""
        if self.exists():
            raise ConfigError("--out", f"{self.path} holds a run already", f"a new folder, or `slora-dist train --resume {self.path}`")
        versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(
                "config.json", {"settings": config.model_dump(), "versions": versions, "world": dict(world), "seed": config.run.seed}
            )
        except OSError as error:
            raise ConfigError("--out", f"{self.path} cannot be written ({error.strerror})", "a folder that you may write to") from None
        self._created = True

    def discard(self) -> None:
        """Take back what ``create`` has made, if it has, for a start that is refused: the corrected command finds no run there."""
        if self._created:
            (self.path / "config.json").unlink()
            with suppress(OSError):  # something else is in it
                self.path.rmdir()

    def exists(self) -> bool:
        """Whether a run is there."""
        return (self.path / "config.json").exists()

    def begun_by(self, launch: str | None) -> bool:
        """Whether this run was begun by that launch."""
        world = self._read("config.json").get("world")
        return launch is not None and isinstance(world, dict) and world.get("launch") == launch

    @property
    def transport(self) -> str:
        """The transport on which the run began. Raises ``ConfigError`` when this is no run folder."""
        world = self._read("config.json").get("world")
        if not isinstance(world, dict) or not isinstance(world.get("transport"), str):
            raise ConfigError(str(self.path / "config.json"), "tells of no transport", RUN)
        return str(world["transport"])

    def config(self) -> Config:
        """Read the settings back. Raises ``ConfigError`` when this is no run folder."""
        tree = self._read("config.json").get("settings")
        if not isinstance(tree, dict):
            raise ConfigError(str(self.path / "config.json"), "holds no settings of a run", RUN)
        return validate(tree)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then point ``latest`` to it, then delete the one before."""
        base = self.path / "checkpoint"
        name = f"round-{checkpoint.values['round']:05d}"
        draft = base / f".{name}.part"
        with writing(draft):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            save_file({key: tensor.contiguous().cpu() for key, tensor in checkpoint.tensors.items()}, draft / "state.safetensors")
            (draft / "state.json").write_text(json.dumps(checkpoint.values, indent=1), encoding="utf-8")
            (draft / CHECKSUM).write_text(checksum(draft), encoding="utf-8")
            for path in (*draft.iterdir(), draft):
                sync(path)
            shutil.rmtree(base / name, ignore_errors=True)
            draft.rename(base / name)
        with writing(base / "latest"):
            for path in self._records():  # a checkpoint must not outlast the lines of its rounds, epsilon's among them
                sync(path)
            sync(base)
            replace(base / "latest", name)
            sync(base)  # before the one before is deleted: after a power failure one of the two is named, and there
        for old in (path for pattern in ("round-*", ".round-*.part") for path in base.glob(pattern)):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)  # what cannot be deleted yet is found again at the next checkpoint

    def save_behind(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint while the caller goes on, once the one before is written; ``wait`` says when it is, and raises what failed."""
        self.wait()
        snapshot = Checkpoint({name: tensor.detach().clone() for name, tensor in checkpoint.tensors.items()}, checkpoint.values)
        self._writing = self._writer.submit(self.save, snapshot)

    def wait(self) -> None:
        """Return when the last checkpoint is written."""
        if self._writing:
            try:
                self._writing.result()  # a signal may come in the middle of this, and `finish` then still has to wait
            finally:
                if self._writing.done():
                    self._writing = None

    def finish(self) -> None:
        """Return when no checkpoint is being written any more, however that ended, or after ``FINISH_SECONDS``."""
        if self._writing:
            wait([self._writing], FINISH_SECONDS)

    def latest(self) -> Checkpoint | None:
        """Return the last complete checkpoint, or None when no round was finished. Raises ``ConfigError`` when it cannot be read."""
        pointer = self.path / "checkpoint" / "latest"
        if not pointer.exists():
            return None
        path = pointer
        try:
            name = pointer.read_text(encoding="utf-8").strip()
            if not re.fullmatch(r"round-\d{5,}", name):
                raise ValueError(f"{name[:40]!r} is no checkpoint's name")
            path = pointer.with_name(name) / "state.json"
            values = json.loads(path.read_text(encoding="utf-8"))
            if not _is_state(values):
                raise ValueError("no state of a run")
            path = path.with_name("state.safetensors")
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # those map the file, which NFS keeps for them
            checkpoint = Checkpoint(tensors, values)
            path = path.with_name(CHECKSUM)
            if path.exists() and path.read_text(encoding="utf-8") != checksum(path.parent):  # those of earlier versions have none
                raise ValueError("the files beside it are not those that were written")
            return checkpoint
        except (OSError, SafetensorError, ValueError, RecursionError) as error:  # brackets without end
            cause = str(error).partition("\n")[0]
            raise ConfigError("--resume", f"{path} cannot be read ({cause})", "a run with a complete checkpoint") from None

    def save_base(self, weights: Mapping[str, Tensor], phase: int) -> None:
        """Write the weights of the frozen base that phase number ``phase`` and those before it have changed at their start."""
        path = self._base(phase)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            draft = path.with_suffix(".part")
            save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, draft)
            sync(draft)
            draft.replace(path)

    def load_base(self, phase: int) -> dict[str, Tensor]:
        """Read what ``save_base`` wrote. Raises ``RunError`` naming the file when it cannot be read."""
        path = self._base(phase)
        try:
            weights: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path} cannot be read ({error}): without it this run cannot be resumed") from None
        return weights

    def _base(self, phase: int) -> Path:
        return self.path / "checkpoint" / f"base-{phase}.safetensors"

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to one of the ``RECORDS``, or to the ``SUMS``."""
        path = self.path / f"{name}.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def played(self, checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
        """Return the records of all rounds up to a checkpoint, with that of the last one where its score is still to come."""
        if checkpoint is None:
            return []
        return [record for record in (*self.lines("metrics"), checkpoint.values["unjudged"]) if record]

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of such a file; an unfinished last one is left out. Raises ``ConfigError`` for any other damage."""
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            if not all(isinstance(line, dict) and type(line.get("round")) is int for line in lines):
                raise ValueError("a line that tells of no round")
            return lines
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(str(path), f"cannot be read ({error})", "one JSON object with its round in every line") from None

    def rewind(self, rounds: int, unjudged: bool = False) -> None:
        """Drop what was noted after round ``rounds``, but for sums: those rounds will be played again.

        Its own record goes where it is ``unjudged``.
        """
        for path in self._records():
            last = inf if path.stem == SUMS else rounds - (unjudged and path.stem == "metrics")
            kept = [line for line in self.lines(path.stem) if line["round"] <= last]
            replace(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _records(self) -> list[Path]:
        """Return the files of lines that are there."""
        paths = (self.path / f"{name}.jsonl" for name in (*RECORDS, SUMS))
        return [path for path in paths if path.exists()]

    def reopen(self) -> None:
        """Let the run count as unfinished: what it leaves is written anew."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        with writing(self.path / "summary.json"):
            self._write("summary.json", summary)

    def write_parquet(self) -> None:
        """Write the ledger once more as ``ledger.parquet``, with a column for the bytes of each kind."""
        import pyarrow  # a second, and only at the end of a run
        import pyarrow.parquet

        lines = self.lines("ledger")
        kinds = sorted({kind for line in lines for kind in line["bytes_by_kind"]})
        rows = [
            {key: value for key, value in line.items() if key != "bytes_by_kind"}
            | {f"{kind}_bytes": line["bytes_by_kind"].get(kind, 0) for kind in kinds}
            for line in lines
        ]
        draft = self.path / ".ledger.parquet.part"
        with writing(draft):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), draft)
            draft.replace(self.path / "ledger.parquet")

    def summary(self) -> dict[str, Any]:
        """Read ``summary.json``. Raises ``ConfigError`` when the run is not finished."""
        return self._read("summary.json")

    def _write(self, name: str, tree: Mapping[str, Any]) -> None:
        replace(self.path / name, json.dumps(tree, indent=1) + "\n")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(str(self.path / name), f"cannot be read ({error.__class__.__name__})", RUN) from None
        if not isinstance(tree, dict):
            raise ConfigError(str(self.path / name), "holds something else", RUN)
        return tree


def checksum(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint's two files: a damaged disk shows, where the damage makes no file unreadable."""
    whole = hashlib.sha256()
    for name in ("state.json", "state.safetensors"):
        with (checkpoint / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _is_state(values: Any) -> bool:
    """Whether these are a checkpoint's values."""
    if not isinstance(values, dict) or not all(type(values.get(name)) is int and values[name] >= 0 for name in ("round", "phase")):
        return False
    records = [values.get(name, 0) for name in ("switch", "score", "unjudged")]
    lost = values.get("lost", [])  # those of earlier versions have none
    if not (isinstance(lost, list) and all(isinstance(one, dict) and one.keys() == LOSS for one in lost)):
        return False
    score = values.get("score")
    known = score is None or (
        isinstance(score, dict) and score.keys() == {"accuracy", "loss"} and {*map(type, score.values())} <= {float, int}
    )
    known = known and values.get("collective", "gather") in ("gather", "reduce")  # earlier versions had none
    return known and all(record is None or isinstance(record, dict) for record in records)
