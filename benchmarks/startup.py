"""From the start of the process to the first round, against importing torch, transformers and peft once.

The run is SLoRA on a network of MiniLM's shape with the default split. (A Dirichlet split adds a second: its library imports matplotlib.)
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Row, middle, ratio
from benchmarks.jobs import MINILM

RUNS = 5
IMPORTS = "import time, torch, transformers, peft; print(time.monotonic())"
# the command itself; its first round says the time and leaves. Modules are imported where the command imports them
FIRST_ROUND = """
import os, sys, time
from contextlib import contextmanager
from slora_dist import cli
def leave(*_):
    print(time.monotonic(), flush=True)
    os._exit(0)
@contextmanager
def importing(uncollected=cli._uncollected):
    with uncollected():
        yield
    if session := sys.modules.get("slora_dist.rounds.session"):
        session.Session._round = leave
cli._uncollected = importing
sys.exit(cli.main(sys.argv[1:]))
"""


def seconds(code: str, *arguments: str) -> float:
    """Return the seconds from the start of a Python process to the moment that it prints; the clock is one for all processes."""
    began = time.monotonic()
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True, check=True, timeout=300)
    return float(told.stdout.split()[-1]) - began


def first_round() -> float:
    """Return the seconds until the first round of a run with a network of MiniLM's shape."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds(
            FIRST_ROUND, "train", "configs/tiny.yaml", f"model.config={MINILM}", "data.partition=iid", "--out", str(Path(folder) / "run")
        )


def rows() -> list[Row]:
    """Return the row of the start-up."""
    taken: dict[str, list[float]] = {"ours": [], "imports": []}
    for _ in range(RUNS + 1):
        taken["ours"].append(first_round())
        taken["imports"].append(seconds(IMPORTS))
    ours, imports = taken["ours"][1:], taken["imports"][1:]
    beside = {"seconds": middle(ours), "imports": middle(imports)}
    return [Row("start-up to the first round", ratio(ours, imports), 1.3, 1.0, RUNS, "importing torch, transformers and peft", beside)]
