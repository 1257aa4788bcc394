"""The figures of a finished run, re-derived from its own ledger and metrics."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from slora_dist.config import Config
from slora_dist.ledger import Row, totals
from slora_dist.model import TaskModel
from slora_dist.plan import full_finetuning
from slora_dist.runfolder import RunFolder


def summarize(config: Config, folder: RunFolder, classifier: TaskModel, switch: dict[str, Any] | None, world_size: int) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    metrics = folder.lines("metrics")
    ledger = folder.lines("ledger")
    payload = totals(ledger)
    trained = {name: sum(len(line["clients"]) for line in metrics if line["phase"] == name) for name in payload["by_phase"]}
    per_client = {name: {way: entry[way] / trained[name] for way in ("up", "down")} for name, entry in payload["by_phase"].items()}
    scores = {name: metrics[-1][name] for name in ("accuracy", "loss", "perplexity") if name in metrics[-1]}
    return scores | {
        "rounds": len(metrics),
        "world_size": world_size,
        "payload_bytes": payload,
        "payload_bytes_per_client_and_round": per_client,
        "full_finetuning_payload_bytes": full_finetuning(config, classifier, sum(len(line["clients"]) for line in metrics)),
        "switch": switch,
        "personal": metrics[-1].get("personal"),
        "left_out": _left_out(metrics),
        "privacy": metrics[-1].get("privacy"),
        "seconds": _seconds(metrics),
        "network_seconds": sum(line["network"]["seconds"] for line in metrics) if all(line["network"] for line in metrics) else None,
        "collectives": _collectives(ledger),
        "counted": _counted(folder.lines("counters")),
    }


def _left_out(metrics: list[dict[str, Any]]) -> dict[str, int]:
    """Count the clients that were left out of rounds, by reason."""
    return dict(Counter(reason for line in metrics for reason in line.get("left_out", {}).values()))


def _seconds(metrics: list[dict[str, Any]]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for line in metrics:
        _add(parts, line["seconds"])
    return parts


def _collectives(ledger: list[Row]) -> dict[str, Row]:
    """Sum each operation over all ranks; ``mbyte_per_second`` is what moved against the time in which it could move."""
    sums: dict[str, Row] = {}
    for line in ledger:
        entry = sums.setdefault(line["op"], {"transport_bytes": 0, "seconds": 0.0, "wait_seconds": 0.0})
        for key in entry:
            entry[key] += line[key]
    for entry in sums.values():
        moving = entry["seconds"] - entry["wait_seconds"]
        entry["mbyte_per_second"] = entry["transport_bytes"] / moving / 1e6 if moving > 0 else None
    return sums


def _counted(counters: list[Row]) -> Row:
    """Sum what the kernel counted while rounds were played: ``{tcp: over all ranks, interfaces: {host: {interface: bytes}}}``."""
    tcp: dict[str, int] = {}
    interfaces: dict[str, dict[str, dict[str, int]]] = {}
    for row in counters:
        _add(tcp, row["tcp"])
        for name, counts in {**row["interfaces"], **row["infiniband"]}.items():
            _add(interfaces.setdefault(row["host"], {}).setdefault(name, {}), counts)
    return {"tcp": tcp, "interfaces": interfaces}


def _add(sums: dict[str, Any], counts: Mapping[str, Any]) -> None:
    for name, count in counts.items():
        sums[name] = sums.get(name, 0) + count
