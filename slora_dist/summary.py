"""The figures of a finished run, re-derived from its own ledger and metrics."""

from typing import Any

from slora_dist.config import Config
from slora_dist.ledger import totals
from slora_dist.model import Classifier
from slora_dist.plan import full_finetuning
from slora_dist.runfolder import RunFolder


def summarize(config: Config, folder: RunFolder, classifier: Classifier, switch: dict[str, Any] | None, world_size: int) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    metrics = folder.lines("metrics")
    payload = totals(folder.lines("ledger"))
    rounds = {name: sum(line["phase"] == name for line in metrics) for name in payload["by_phase"]}
    per_client = {
        name: {way: entry[way] / (rounds[name] * config.sampled) for way in ("up", "down")} for name, entry in payload["by_phase"].items()
    }
    return {
        "accuracy": metrics[-1]["accuracy"],
        "loss": metrics[-1]["loss"],
        "rounds": len(metrics),
        "world_size": world_size,
        "payload_bytes": payload,
        "payload_bytes_per_client_and_round": per_client,
        "full_finetuning_payload_bytes": full_finetuning(config, classifier),
        "switch": switch,
        "seconds": _seconds(metrics),
    }


def _seconds(metrics: list[dict[str, Any]]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for line in metrics:
        for part, seconds in line["seconds"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    return parts
