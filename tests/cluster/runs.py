"""What is read from run folders."""

import json
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def adapter(run: Path) -> bytes:
    """The result of a run, to the bit."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def lines(run: Path, name: str) -> Records:
    """Return the lines of ``metrics.jsonl`` or ``ledger.jsonl``, none as long as there is no file."""
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def payload(run: Path) -> dict[tuple[int, str], int]:
    """Return a ledger's payload by round and direction, control messages left out: they depend on the number of ranks."""
    sums: dict[tuple[int, str], int] = {}
    for line in lines(run, "ledger.jsonl"):
        if line["direction"] != "control":
            key = (line["round"], line["direction"])
            sums[key] = sums.get(key, 0) + line["payload_bytes"]
    return sums


def rounds(run: Path) -> list[int]:
    """Return the numbers of the rounds that are noted."""
    return [record["round"] for record in lines(run, "metrics.jsonl")]


def ranks(run: Path) -> set[int]:
    """Return the ranks that the ledger has heard of."""
    return {line["rank"] for line in lines(run, "ledger.jsonl")}
