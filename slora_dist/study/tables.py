"""A study's tables: each row a combination of labels, its seeds together; the columns of the paper's cost tables, and rounds to targets.

Costs are those of one client that takes part in every round, on a link of the given rate in both directions:

    bytes    what a client sent and received, as the report counts it
    Gbit     8 x bytes / 2^30 (the paper's unit)
    minutes  8 x bytes / (rate x 10^6) / 60, and the seconds of its training and of switches, as the report has them
    s/round  seconds of one client's local training: mean over the round's clients, median over a phase's rounds
"""

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slora_dist.config import Config
from slora_dist.data.federation import class_names
from slora_dist.errors import ConfigError
from slora_dist.model import shell
from slora_dist.plan import plan
from slora_dist.report import curves
from slora_dist.report.read import Run, load
from slora_dist.study.grid import METHOD, Cell, Study
from slora_dist.study.play import state

BEST = (3, 5)  # the paper reports the mean of the best 3 of 5 seeds
NOTE = """Figures are means over seeds, +- one standard deviation of a sample.
Costs are those of one client that takes part in every round: Gbit and MB are its messages up and down (2^30 bits, 10^6 bytes), minutes
are these on a link of so many Mbit/s (10^6 bits), its local training and the switch; s/round is its local training. What a method with
two phases has twice stands in order. A target is reached in the first evaluated round whose mean accuracy is as high."""


@dataclass(frozen=True)
class Point:
    """A row's state after a round: means over its seeds; the least and greatest accuracy beside them."""

    round: int
    accuracy: float
    low: float
    high: float
    bytes: float
    minutes: tuple[float, ...]  # at each of the study's rates


@dataclass(frozen=True)
class Row:
    """The finished runs of one combination of labels."""

    labels: dict[str, str]
    config: Config
    runs: list[Run]
    mbit: tuple[float, ...]

    @property
    def method(self) -> str:
        """The label that tells rows of one group apart."""
        return self.labels.get(METHOD, "all")

    @property
    def group(self) -> str:
        """The labels that the row shares with those it is compared to."""
        return " ".join(label for axis, label in self.labels.items() if axis != METHOD)

    @cached_property
    def trainable(self) -> list[int]:
        """Trainable parameters of each phase."""
        return [phase["trainable"] for phase in plan(self.config, shell(self.config.model, class_names(self.config)), [])["phases"]]

    @cached_property
    def points(self) -> list[Point]:
        """The rounds after which every run was evaluated."""
        found = []
        for alike in zip(*map(curves.points, self.runs), strict=False):
            scores = [point.accuracy for point in alike if point.accuracy is not None]
            if len(scores) == len(alike):
                minutes = tuple(statistics.fmean(curves.minutes(point, rate) for point in alike) for rate in self.mbit)
                nbytes = statistics.fmean(point.client for point in alike)
                found.append(Point(alike[0].round, statistics.fmean(scores), min(scores), max(scores), nbytes, minutes))
        return found

    @property
    def last(self) -> Point:
        """The state at the end."""
        return self.points[-1]

    def reached(self, target: float) -> Point | None:
        """Return the first evaluated round whose mean accuracy is ``target`` or more."""
        return next((point for point in self.points if point.accuracy >= target), None)


def rows(study: Study, out: Path) -> list[Row]:
    """Return a row for every combination of labels that has a finished run, in the grid's order.

    Raises ``ConfigError`` without any, and when a folder holds a run with other settings.
    """
    cells: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in study.cells:
        if state(cell, out) == "finished":
            cells[tuple(cell.labels.values())].append(cell)
    if not cells:
        raise ConfigError(str(out), "no run of the study is finished", "the folder of a study; a run's log.txt says why it failed")
    return [Row(alike[0].labels, alike[0].config, [load(out / cell.name) for cell in alike], study.mbit) for alike in cells.values()]


def rival(row: Row, among: Iterable[Row]) -> Row | None:
    """Return the row of full fine-tuning that ``row`` is compared to, if there is one."""
    return next((other for other in among if other.group == row.group and other.config.method.name == "fft"), None)


def figures(row: Row, fft: Row | None, targets: Sequence[float]) -> dict[str, Any]:
    """Return a row's figures by column name; what is not known is None. Sequences are by phase."""
    summaries = [run.summary for run in row.runs if run.summary]
    scores = [summary["accuracy"] for summary in summaries]
    switches = [summary["switch"] for summary in summaries if summary["switch"]]
    last, full = row.last, fft.last if fft else None
    seconds = [statistics.median(_local_seconds(run, phase) for run in row.runs) for phase in row.runs[0].phases]
    result: dict[str, Any] = row.labels | {
        "seeds": len(scores),
        "trainable": row.trainable,
        "accuracy": statistics.fmean(scores),
        "accuracy_std": statistics.stdev(scores) if len(scores) > 1 else None,
        "accuracy_best": statistics.fmean(sorted(scores)[-BEST[0] :]) if len(scores) == BEST[1] else None,
        **_perplexity(summaries),
        "rounds": [sum(line["phase"] == phase for line in row.runs[0].rounds) for phase in row.runs[0].phases],
        "gbit": 8 * last.bytes / 2**30,
        "mbyte": last.bytes / 1e6,
        "seconds_per_round": seconds,
        "switch_seconds": statistics.fmean(sum(curves.switch_seconds(run).values()) for run in row.runs),
        "bytes_of_fft": last.bytes / full.bytes if full else None,
        "before_switch": statistics.fmean(switch["accuracy_before"] for switch in switches) if switches else None,
        "after_switch": statistics.fmean(switch["accuracy_after"] for switch in switches) if switches else None,
    }
    for at, rate in enumerate(row.mbit):
        result[f"minutes_{rate:g}_mbit"] = last.minutes[at]
        result[f"minutes_{rate:g}_mbit_of_fft"] = last.minutes[at] / full.minutes[at] if full else None
    for target in targets:
        point = row.reached(target)
        result[f"rounds_to_{target:g}"] = point.round if point else None
        result[f"gbit_to_{target:g}"] = 8 * point.bytes / 2**30 if point else None
        for at, rate in enumerate(row.mbit):
            result[f"minutes_{rate:g}_mbit_to_{target:g}"] = point.minutes[at] if point else None
    return result


def _local_seconds(run: Run, phase: str) -> float:
    """Return the seconds of a client's local training in a round: mean over the round's clients, median over the phase's rounds."""
    return float(statistics.median(line["seconds"]["train"] / len(line["clients"]) for line in run.rounds if line["phase"] == phase))


def _perplexity(summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean perplexity of causal language models, nothing of classifiers."""
    found = [summary["perplexity"] for summary in summaries if "perplexity" in summary]
    return {"perplexity": statistics.fmean(found)} if found else {}


def write(study: Study, out: Path, found: Sequence[Row]) -> None:
    """Write ``tables.md``, ``tables.csv`` (a line a row) and ``curves.csv`` (a line for each row and evaluated round)."""
    by_row = [(row, figures(row, rival(row, found), study.targets)) for row in found]
    (out / "tables.md").write_text(markdown(study, by_row), encoding="utf-8")
    (out / "tables.csv").write_text(_csv([{key: _flat(value) for key, value in line.items()} for _, line in by_row]), encoding="utf-8")
    curves = [row.labels | _coordinates(point, row.mbit) for row in found for point in row.points]
    (out / "curves.csv").write_text(_csv(curves), encoding="utf-8")


def _coordinates(point: Point, mbit: Sequence[float]) -> dict[str, float]:
    scores = {"accuracy": point.accuracy, "accuracy_low": point.low, "accuracy_high": point.high}
    minutes = {f"minutes_{rate:g}_mbit": minutes for rate, minutes in zip(mbit, point.minutes, strict=True)}
    return {"round": point.round} | scores | {"mbyte": point.bytes / 1e6} | minutes


def _flat(value: Any) -> Any:
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value) if isinstance(value, list) else value


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown(study: Study, by_row: Sequence[tuple[Row, Mapping[str, Any]]]) -> str:
    """Return all tables as Markdown: costs and targets of each group of rows that are compared."""
    finished = sum(len(row.runs) for row, _ in by_row)
    lines = [f"# {study.name}", "", f"{finished} of {len(study.cells)} runs are finished. {NOTE}", ""]
    for group in dict.fromkeys(row.group for row, _ in by_row):
        alike = [(row.method, line) for row, line in by_row if row.group == group]
        lines += [f"## {group}" if group else "## All", "", *_costs(study, alike), ""]
        lines += [*_targets(study, alike), ""] if study.targets else []
    return "\n".join(lines)


def _costs(study: Study, alike: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    best = any(line["accuracy_best"] is not None for _, line in alike)
    causal = any("perplexity" in line for _, line in alike)
    head = [
        "method",
        "seeds",
        "trainable",
        "rounds",
        *(["perplexity"] if causal else []),
        "accuracy",
        *(["best 3 of 5"] if best else []),
        "at the switch",
    ]
    head += ["Gbit", "MB", "of FFT"]
    head += [column for rate in study.mbit for column in (f"min at {rate:g}", "of FFT")] + ["s/round"]
    return _table(head, [_cost(study, method, line, best, causal) for method, line in alike])


def _cost(study: Study, method: str, line: Mapping[str, Any], best: bool, causal: bool) -> list[str]:
    spread = f" +- {100 * line['accuracy_std']:.2f}" if line["accuracy_std"] is not None else ""
    cells = [method, str(line["seeds"]), _then(f"{count:,}" for count in line["trainable"]), _then(map(str, line["rounds"]))]
    cells += [_number(line.get("perplexity"))] if causal else []
    cells += [_percent(line["accuracy"]) + spread] + ([_percent(line["accuracy_best"])] if best else [])
    switched = line["before_switch"] is not None
    cells += [f"{_percent(line['before_switch'])} to {_percent(line['after_switch'])}" if switched else "-"]
    cells += [_number(line["gbit"]), f"{line['mbyte']:,.1f}", _percent(line["bytes_of_fft"])]
    for rate in study.mbit:
        cells += [_number(line[f"minutes_{rate:g}_mbit"]), _percent(line[f"minutes_{rate:g}_mbit_of_fft"])]
    return [*cells, _then(f"{seconds:.2f}" for seconds in line["seconds_per_round"])]


def _targets(study: Study, alike: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    names = {f"rounds_to_{target:g}": f"rounds to {100 * target:g} %" for target in study.targets}
    for target in study.targets:
        names |= {f"gbit_to_{target:g}": f"Gbit to {100 * target:g} %"}
        names |= {f"minutes_{rate:g}_mbit_to_{target:g}": f"min at {rate:g} to {100 * target:g} %" for rate in study.mbit}
    return _table(["method", *names.values()], [[method, *(_number(line[name]) for name in names)] for method, line in alike])


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def _then(parts: Iterable[str]) -> str:
    return " then ".join(parts)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:,.1f}" if value >= 100 else f"{value:.3g}"
