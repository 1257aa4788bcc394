"""All benchmarks: ``python -m benchmarks.run [NAME...]``. Prints every row and writes results.json and the table in docs/performance.md.

Named ones are measured anew and replace their own rows; the others keep theirs.
"""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slora_dist import memory

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- table: made by benchmarks/run.py -->", "<!-- end of table -->"
SUITE = ("steps:MiniLM", "steps:DistilBERT", "memory", "codec", "svd", "mean", "overhead", "ledger", "startup", "scale")


def measure(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of benchmarks, printing each as it is found."""
    found = []
    for name in names:
        module, *part = name.split(":")
        for row in importlib.import_module(f"benchmarks.{module}").rows(*part):
            entry = {key: getattr(row, key) for key in ("name", "ratio", "target", "limit", "runs", "against")}
            found.append(entry | {"beside": dict(row.beside), "benchmark": name})
            print(line(found[-1]), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of the table, with the absolute figures that stand beside it."""
    beside = ", ".join(f"{name} {value:.3g}" for name, value in row["beside"].items())
    figures = " | ".join(f"{row[key]:.3g}" for key in ("ratio", "target", "limit"))
    against = row["against"] + (f" ({beside})" if beside else "")
    return f"| {row['name']} | {figures} | {'yes' if row['ratio'] <= row['target'] else '**no**'} | {row['runs']} | {against} |"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = "| what | ratio | target | limit | met | runs | against (and beside) |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *map(line, rows)])


def publish(rows: list[dict[str, Any]]) -> None:
    """Write results.json, and the table between its markers."""
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")


def main(names: list[str]) -> int:
    """Measure what is named, or all; the exit code is 0 whatever was met, since a target is no test."""
    memory.keep()  # as the program itself does, and for rivals alike
    import torch

    torch.set_num_threads(1)
    chosen = names or list(SUITE)
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if names and RESULTS.exists() else []
    for name in chosen:  # published after each, so that a stop loses one
        others = [row for row in rows if row["benchmark"] != name]
        rows = sorted(others + measure([name]), key=lambda row: SUITE.index(row["benchmark"]))
        publish(rows)
    missed = [row["name"] for row in rows if row["ratio"] > row["target"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} targets met", *missed, sep="\n  missed: ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
