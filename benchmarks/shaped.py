"""Round times on really shaped links, beside what ``plan`` foretold and what emulation made of the same run. Needs root, ``ip`` and ``tc``.

``python -m benchmarks.shaped [MBIT...]``: 8 minutes at 10 Mbit/s, 5 at 100.

Four hosts (network namespaces) sit behind links of 10 and of 100 Mbit/s. On them a doctor rehearses, then the run is played: sparse, dense
and low-rank rounds of one model, about 5 MB of weights, whose clients take one small step: a round is its messages. They are smaller
than what a sender's kernel takes at once (LoRA r 8), somewhat larger, and much larger (FFT). The same run on one host with
``network.mode: sleep`` is the emulation.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Row
from drill.network import Network

ROOT = Path(__file__).parents[1]
HOSTS, RATES = 4, (10, 100)
PLAN, EMULATION = 0.15, 0.10  # the most by which a round may be off
PHASES = {"SFT 30 %": "sparse", "FFT": "dense", "LoRA r 8": "lowrank", "LoRA r 32": "lowrank-2"}
SETTINGS = (
    "configs/tiny.yaml",
    "method.name=custom",
    "method.phases=[{kind: sparse, rounds: 5, density: 0.3}, {kind: dense, rounds: 3}, {kind: lowrank, rounds: 6, rank: 8},"
    " {kind: lowrank, rounds: 5, rank: 32}]",
    "model.config.hidden_size=256",
    "model.config.intermediate_size=512",
    "clients.count=3",
    "clients.per_round=3",
    "clients.steps=1",
    "clients.batch_size=2",
    "server.eval_every=0",
)
ENVIRON = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]),
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}
SECONDS = 1200.0


def at(mbit: int) -> list[Row]:
    """Return how far plan and emulation are off the measured round at a rate, for every phase."""
    with tempfile.TemporaryDirectory(prefix="shaped-") as scratch:
        folder = Path(scratch)
        (folder / "configs").symlink_to(ROOT / "configs")
        hosts = Network(HOSTS, mbit)
        try:
            hosts.up()
            _on_hosts(hosts, folder, "doctor", *SETTINGS, "--out", "machine.json")
            _on_hosts(hosts, folder, "train", *SETTINGS, "--out", "shaped")
        finally:
            hosts.down()
        links = (f"network.up_mbit={mbit}", f"network.down_mbit={mbit}", f"network.server_mbit={mbit}", "network.routing=collective")
        emulated = ["torchrun", "--standalone", "--nproc-per-node", str(HOSTS), "-m", "slora_dist", "train", *SETTINGS]
        _alone(folder, [*emulated, "network.mode=sleep", *links, "--out", "emulated"])
        plan = ["python", "-m", "slora_dist", "plan", *SETTINGS, "--machine", "machine.json", "--json"]
        foretold = json.loads(_alone(folder, plan))["seconds"]
        return [row for name, phase in PHASES.items() for row in _compare(folder, mbit, name, phase, foretold[phase])]


def _compare(folder: Path, mbit: int, name: str, phase: str, foretold: dict[str, float]) -> list[Row]:
    measured, emulated = (_round(folder / run, phase) for run in ("shaped", "emulated"))
    beside = {"measured s": measured, "plan s": foretold["round"], "emulated s": emulated}
    off = {"plan": (foretold["round"], PLAN), "emulation": (emulated, EMULATION)}
    against = "|told / measured - 1| of a round, 4 hosts on shaped links"
    return [
        Row(f"{kind} of a round, {name}, {mbit} Mbit/s", abs(seconds / measured - 1), most, 0.0, 4, against, beside)
        for kind, (seconds, most) in off.items()
    ]


def _round(run: Path, phase: str) -> float:
    """Return the median seconds of the phase's rounds without the first and without evaluation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds: list[dict[str, Any]] = [record["seconds"] for record in records if record["phase"] == phase][1:]
    return statistics.median(seconds["total"] - seconds["evaluate"] for seconds in rounds)


def _on_hosts(hosts: Network, folder: Path, *arguments: str) -> None:
    meet = ("--nnodes", str(HOSTS), "--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29400", "--rdzv-id", arguments[0])
    command = ["torchrun", *meet, "--nproc-per-node", "1", "-m", "slora_dist", *arguments]
    hosts.run(dict.fromkeys(range(1, HOSTS + 1), command), folder, ENVIRON, SECONDS)


def _alone(folder: Path, command: list[str]) -> str:
    return subprocess.run(command, cwd=folder, env=ENVIRON, check=True, timeout=SECONDS, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    for mbit in map(int, sys.argv[1:] or RATES):
        for row in at(mbit):
            beside = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row.beside.items())
            print(f"{row.name:45} off by {row.ratio:6.1%} (at most {row.target:.0%})  {beside}", flush=True)
