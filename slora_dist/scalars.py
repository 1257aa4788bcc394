"""A run's figures as scalars by round, for the trackers that people already look at.

Tags are ``train/loss``, ``test/accuracy``, ``test/loss``, ``test/perplexity`` (of causal language models),
``clients/accuracy/mean`` and the like (on the clients' own held-out documents), ``payload/up``, ``payload/down`` (bytes of all clients
in the round),
``payload/total`` (bytes since the start), ``seconds/<part>`` and ``network/<part>`` (virtual seconds). Trackers are not installed with
slora_dist; the extra ``track`` names them. Each function takes the name of the run, its settings and a folder, and returns a ``Sink``.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from slora_dist.errors import ConfigError

Record = Mapping[str, Any]  # a line of metrics.jsonl


class Sink(NamedTuple):
    """An open tracker: ``log`` takes (scalars by tag, round), ``close`` ends it."""

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


class Scalars:
    """Hands records, as training makes them or as a file has them, to a tracker."""

    def __init__(self, tracker: str, name: str, settings: Mapping[str, Any], folder: Path, earlier: Iterable[Record] = ()) -> None:
        """Open ``tracker`` (a key of ``TRACKERS``); it has the ``earlier`` rounds already.

        Raises ``ConfigError`` when it is not installed, or a ``folder`` that it needs cannot be made.
        """
        self._sink = TRACKERS[tracker](name, settings, folder)
        self._total = sum(sum(record["payload_bytes"].values()) for record in earlier)

    def add(self, record: Record) -> None:
        """Log the figures of a round."""
        self._total += sum(record["payload_bytes"].values())
        self._sink.log(scalars(record) | {"payload/total": self._total}, record["round"])

    def close(self) -> None:
        """Hand over what is still buffered."""
        self._sink.close()


def scalars(record: Record) -> dict[str, float]:
    """Return the figures of a record by tag; what was not measured is left out."""
    named = {"train/loss": record["train_loss"], "test/accuracy": record["accuracy"], "test/loss": record["loss"]}
    named["test/perplexity"] = record.get("perplexity")
    for figure, measures in (record.get("personal") or {}).items():
        named |= {f"clients/{figure}/{name}": value for name, value in measures.items()} if figure != "count" else {}
    for prefix, parts in (("payload", "payload_bytes"), ("seconds", "seconds"), ("network", "network")):
        named |= {f"{prefix}/{part}": value for part, value in (record.get(parts) or {}).items()}
    return {tag: value for tag, value in named.items() if value is not None}


def send(records: Iterable[Record], tracker: str, name: str, settings: Mapping[str, Any], folder: Path) -> None:
    """Log all records of a run."""
    target = Scalars(tracker, name, settings, folder)
    for record in records:
        target.add(record)
    target.close()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", f"{folder} cannot be made ({error.strerror})", "a folder that you may write to") from None


def _library(name: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(name, "is not installed", f"pip install {name}, or another of {', '.join(TRACKERS)}") from None


def _tensorboard(name: str, settings: Mapping[str, Any], folder: Path) -> Sink:
    """Event files in ``folder``."""
    _library("tensorboard", "tensorboard")
    _make(folder)
    writer = _library("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(folder))

    def log(values: dict[str, float], number: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, number)

    return Sink(log, writer.close)


def _wandb(name: str, settings: Mapping[str, Any], folder: Path) -> Sink:
    """A run of project slora_dist; WANDB_MODE=offline keeps it in ``folder``."""
    _make(folder)
    run = _library("wandb", "wandb").init(project="slora_dist", name=name, config=dict(settings), dir=str(folder))
    return Sink(lambda values, number: run.log(values, step=number), run.finish)


def _mlflow(name: str, settings: Mapping[str, Any], folder: Path) -> Sink:
    """A run of experiment slora_dist on the server in MLFLOW_TRACKING_URI, or mlflow's own default."""
    mlflow = _library("mlflow", "mlflow")
    mlflow.set_experiment("slora_dist")
    mlflow.start_run(run_name=name)
    mlflow.log_dict(dict(settings), "settings.json")
    return Sink(lambda values, number: mlflow.log_metrics(values, step=number), mlflow.end_run)


def _trackio(name: str, settings: Mapping[str, Any], folder: Path) -> Sink:
    """A run of project slora_dist in trackio's local store."""
    trackio = _library("trackio", "trackio")
    trackio.init(project="slora_dist", name=name, config=dict(settings))
    return Sink(lambda values, number: trackio.log(values, step=number), trackio.finish)


TRACKERS: dict[str, Callable[[str, Mapping[str, Any], Path], Sink]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio,
}  # fmt: skip
