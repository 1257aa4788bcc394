"""Run folders made by hand, with every field that a run can have and numbers that are easy to check by head.

A client's message has 1 kB each way in the sparse phase and 500 B in the low-rank one. There are two ranks; rank 1 plays both clients of
a round. A round takes 10 s on rank 0, of which evaluation 1 s; clients train 3 s and 5 s.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny import tiny

ROUNDS = ("method.sparse.rounds=2", "method.lowrank.rounds=2", "clients.count=4", "clients.per_round=2")
START = 1_700_000_000.0


def make(folder: Path, accuracies: Sequence[float | None], *overrides: str, finished: bool = True, network: bool = True) -> Path:
    """Write a run that has played as many rounds as there are accuracies, and return its folder."""
    folder.mkdir(parents=True)
    config = tiny(*ROUNDS, *overrides)
    phases = [phase.kind for phase in config.method.resolved() for _ in range(phase.rounds)]
    played = list(zip(range(1, len(accuracies) + 1), phases, accuracies, strict=False))
    world = {"size": 2, "transport": "gloo"}
    write(folder / "config.json", {"settings": config.model_dump(), "versions": {}, "world": world, "seed": config.run.seed})
    lines(folder / "metrics.jsonl", [_record(*line, network) for line in played])
    lines(folder / "ledger.jsonl", [row for number, phase, _ in played for row in _ledger(number, phase)])
    lines(folder / "timeline.jsonl", [row for number, phase, _ in played for row in _timeline(number, phase, len(set(phases)) > 1)])
    lines(folder / "counters.jsonl", [_counters(number, rank) for number, _, _ in played for rank in (0, 1)])
    if finished:
        write(folder / "summary.json", _summary([message(phase) * 2 for phase in phases], len(set(phases)) > 1))
    return folder


def message(phase: str) -> int:
    return {"sparse": 1000, "lowrank": 500, "dense": 10_000}[phase]


def write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree))


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _record(number: int, phase: str, accuracy: float | None, network: bool) -> dict[str, Any]:
    seconds = {"aggregate": 0.5, "train": 8.0, "slowest_client": 5.0, "evaluate": 1.0, "overlapped": 0.0, "communicate": 2.0, "total": 10.0}
    ways = {"up": 2 * message(phase), "down": 2 * message(phase)}
    links = {"seconds": 30.0, "download": 10.0, "train": 5.0, "upload": 14.0, "server": 1.0}
    return {
        "round": number, "phase": phase, "train_loss": 1.0 / number, "accuracy": accuracy, "loss": accuracy and 1 - accuracy,
        "clients": [1, 3], "num_examples": 20, "seconds": seconds, "payload_bytes": ways, "network": links if network else None,
    }  # fmt: skip


def _ledger(number: int, phase: str) -> list[dict[str, Any]]:
    """A broadcast and a gather on both ranks; rank 0 plays no client; rank 1 waits 1 s of the broadcast's 3 s."""
    rows = []
    for op, direction, began in (("broadcast", "down", 0.0), ("gather", "up", 4.0)):
        for rank in (0, 1):
            kinds = {"value": message(phase) - 100, "head": 100} if rank else {"value": 0, "head": 0}
            by_kind = {kind: 2 * count for kind, count in kinds.items()}
            moved = 1000 if op == "broadcast" else 2000
            rows.append({
                "rank": rank, "round": number, "phase": phase, "op": op, "direction": direction, "kind": "value+head",
                "payload_bytes": sum(by_kind.values()), "bytes_by_kind": by_kind, "clients": 2 * rank, "transport_bytes": moved,
                "began": START + 10 * number + began, "seconds": 3.0, "wait_seconds": 1.0 if rank else 0.0,
            })  # fmt: skip
    return rows


def _timeline(number: int, phase: str, switched: bool) -> list[dict[str, Any]]:
    at = START + 10 * number
    rows = [(1, "train", 1, 3.0, 3.0), (1, "train", 3, 6.0, 1.0), (0, "aggregate", None, 7.0, 0.5), (0, "evaluate", None, 8.0, 1.0)]
    if number == 3 and switched:
        rows.append((0, "switch", None, -1.0, 0.75))
    return [
        {"rank": rank, "round": number, "phase": phase, "what": what, "client": client, "began": at + began, "seconds": seconds}
        for rank, what, client, began, seconds in rows
    ]


def _counters(number: int, rank: int) -> dict[str, Any]:
    eth = {"eth0": {"rx_bytes": 4000, "tx_bytes": 3300}} if not rank else {}
    ports = {"mlx5_0/1": {"rx_bytes": 8, "tx_bytes": 16}} if not rank else {}
    tcp = {"sent_bytes": 1650, "received_bytes": 1650, "segments_out": 3, "segments_in": 3}
    return {"rank": rank, "host": "north", "round": number, "tcp": tcp, "interfaces": eth, "infiniband": ports}


def _summary(ways: Sequence[int], switched: bool) -> dict[str, Any]:
    payload = {"up": sum(ways), "down": sum(ways), "control": 0, "by_phase": {}, "by_kind": {}}
    kept = {"bert.layer.0.query": 0.25, "bert.layer.1.query": 0.5}
    switch = {
        "accuracy_before": 0.5, "accuracy_after": 0.4, "loss_before": 1.0, "loss_after": 1.25,
        "kept_energy": kept, "kept_energy_total": 0.375,
    }  # fmt: skip
    full = {"up": 20_000 * len(ways), "down": 20_000 * len(ways)}
    return {
        "accuracy": 0.0, "loss": 0.0, "rounds": len(ways), "world_size": 2, "payload_bytes": payload, "full_finetuning_payload_bytes": full,
        "switch": switch if switched else None, "seconds": {}, "transport": {}, "wire": {},
    }  # fmt: skip
