"""Draw docs/quickstart.svg from a finished run: python docs/quickstart_figure.py RUN."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

plt.switch_backend("svg")
plt.rcParams["svg.hashsalt"] = "slora_dist"  # the same run gives the same file

COLORS = {"sparse": "#0072b2", "lowrank": "#d55e00"}


def main(run: Path) -> None:
    """Read the run's metrics and summary, and write the figure beside this file."""
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    full = sum(summary["full_finetuning_payload_bytes"].values()) / len(rounds)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    spent = 0.0
    for record in rounds:
        color = COLORS[record["phase"]]
        spent += sum(record["payload_bytes"].values())
        if record["accuracy"] is not None:
            left.plot(record["round"], 100 * record["accuracy"], "o", color=color)
        right.plot(record["round"], spent / 1e9, "s", markersize=4, color=color)
        right.plot(record["round"], full * record["round"] / 1e9, ".", color="0.6")
    last_sparse = max(record["round"] for record in rounds if record["phase"] == "sparse")
    left.plot(last_sparse + 0.3, 100 * summary["switch"]["accuracy_after"], "v", color="0.3")
    left.annotate("after the switch", (last_sparse + 0.8, 100 * summary["switch"]["accuracy_after"]), va="center", fontsize=8)
    left.set(xlabel="round", ylabel="test accuracy, %", xlim=(0, len(rounds) + 1), ylim=(0, 80))
    right.set(xlabel="round", ylabel="payload so far, GB", yscale="log")
    right.annotate("full fine-tuning", (len(rounds) * 0.55, full * len(rounds) * 1.0 / 1e9), fontsize=8, color="0.4")
    for phase, color in COLORS.items():
        left.plot([], [], "o", color=color, label=f"{phase} phase")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("quickstart.svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
