"""The drawings, in one style: inline SVG that follows the page's light or dark scheme, and SVG and PNG files on white.

Series colours are Okabe and Ito's, which colour-blind readers tell apart; line styles and markers repeat the distinction.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from slora_dist.evaluate import perplexity
from slora_dist.report import curves, gantt, traffic
from slora_dist.report.blocks import Figure, Swatch, nbytes
from slora_dist.report.read import Group, Run
from slora_dist.report.tables import client_by_phase

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8528f", "#c98a00", "#3f9fd6", "#6b7178")  # page.html has their twins for the dark scheme
DASHES = ((), (4.5, 1.6), (1.2, 1.3), (6, 1.5, 1.2, 1.5))  # lengths drawn and left out, in line widths
MARKERS = "osD^"
INK, LINE, PAPER = "#1b1f24", "#d9dee4", "#ffffff"
VARIABLES = {colour: f"var(--c{at})" for at, colour in enumerate(COLOURS)} | {
    INK: "currentColor",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8.5, "axes.labelsize": 8.5, "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": LINE, "grid.color": LINE,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "legend.frameon": False, "lines.linewidth": 1.6,
    "lines.markersize": 3.5, "svg.fonttype": "none", "savefig.dpi": 160,
}  # fmt: skip
WIDTH = 3.9  # inches; a phone shows this in its whole width with letters of 10 pixels
UNITS = {"client": 1e6, "payload": 1e6, "seconds": 60.0, "network": 60.0}
NAMES = {"round": "round", "client": "MB of one client, up and down", "payload": "MB of all clients, up and down",
         "seconds": "minutes, evaluation left out", "network": "minutes on the emulated network"}  # fmt: skip
SOURCES = {
    "round": "metrics.jsonl: {} by round.",
    "client": "metrics.jsonl: {}; ledger.jsonl: payload_bytes / clients, for one client that takes part in every round.",
    "payload": "metrics.jsonl: {}, payload_bytes (all clients of the rounds).",
    "seconds": "metrics.jsonl: {}, seconds.total - seconds.evaluate; timeline.jsonl: switch.",
    "network": "metrics.jsonl: {}, network.seconds (virtual seconds on the emulated links).",
}
SCALES = {"accuracy": (100.0, "test accuracy, %"), "perplexity": (1.0, "test perplexity")}


def _drawing(height: float) -> Drawing:
    return Drawing(figsize=(WIDTH, height), layout="constrained")


def _finish(drawing: Drawing, folder: Path, name: str, title: str, source: str, keys: Sequence[Line2D] = ()) -> Figure:
    """Write the files and return the figure with its inline SVG. ``keys`` are drawn in the files only: the page has a key of its own."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        page = StringIO()
        drawing.savefig(page, format="svg", metadata={"Date": None})
        if len(keys) > 1:
            drawing.set_figheight(drawing.get_figheight() + 0.17 * len(keys))
            drawing.legend(handles=list(keys), loc="outside lower left", handlelength=2.8)
        drawing.savefig(folder / f"{name}.svg", facecolor=PAPER, metadata={"Date": None})
        drawing.savefig(folder / f"{name}.png", facecolor=PAPER)
    return Figure(name, title, source, inline(page.getvalue(), name, title))


def inline(svg: str, name: str, title: str) -> str:
    """Make an SVG file part of a page: its ids unlike those of other figures, colours by the page's variables, nothing that is fetched."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    box = re.search(r'viewBox="[^"]+"', body)
    assert box
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    for sign in ('id="', 'href="#', "url(#"):
        body = body.replace(sign, f"{sign}{name}-")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    return f'<svg {box[0]} role="img" aria-label="{re.sub(r"[^ -~]|[<>&]", "", title).replace(chr(34), "")}">{body}'


def scores(groups: Sequence[Group], measure: str, axis: str, folder: Path, name: str, title: str) -> list[Figure]:
    """Draw one of ``SCALES`` over a cost: the mean of each group, a band from its lowest to its highest seed; nothing without figures."""
    lines = [(group, means) for group in groups if (means := [mean for mean in curves.curve(group) if _has(mean, measure, axis)])]
    if not lines:
        return []
    with matplotlib.rc_context(STYLE):
        drawing = _drawing(2.7)
        axes = drawing.add_subplot()
        ends = [means[-1].value(axis) for _, means in lines]
        for group, means in lines:
            _draw_group(axes, group, means, measure, axis)
        axes.set(xlabel=NAMES[axis], ylabel=SCALES[measure][1])
        found = [mean.value(measure) for _, means in lines for mean in means]
        if measure == "perplexity" and max(found) > 8 * min(found):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,g}")
        if axis != "round" and max(ends) > 8 * min(ends):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,g}")
    keys = [Line2D([], [], label=group.name, **look(group)) for group, _ in lines]
    return [_finish(drawing, folder, name, title, SOURCES[axis].format(measure) + _reading(groups), keys)]


def _has(mean: curves.Mean, *figures: str) -> bool:
    return all(getattr(point, figure) is not None for point in mean.at for figure in figures)


def _reading(groups: Sequence[Group]) -> str:
    several = " Lines: mean over seeds; bands: lowest to highest." if any(len(group.runs) > 1 for group in groups) else ""
    switched = any(run.switch for group in groups for run in group.runs)
    return several + " Open triangles: after the switch." * switched


def look(group: Group) -> dict[str, Any]:
    """Return colour, dashes and marker of a group, the same in every figure."""
    dashes = DASHES[group.dash]
    return {"color": COLOURS[group.colour], "linestyle": (0, dashes) if dashes else "-", "marker": MARKERS[group.dash]}


def key(groups: Sequence[Group]) -> list[Swatch]:
    """Return the page's key to the lines of ``groups``."""
    return [Swatch(group.colour, " ".join(f"{1.6 * length:g}" for length in DASHES[group.dash]), group.name) for group in groups]


def _draw_group(axes: Axes, group: Group, means: Sequence[curves.Mean], measure: str, axis: str) -> None:
    scale, _ = SCALES[measure]
    x = [mean.value(axis) / UNITS.get(axis, 1.0) for mean in means]
    color = look(group)["color"]
    axes.plot(x, [scale * mean.value(measure) for mean in means], **look(group))
    if len(group.runs) > 1:
        low, high = zip(*(mean.span(measure) for mean in means), strict=True)
        axes.fill_between(x, [scale * value for value in low], [scale * value for value in high], color=color, alpha=0.18, lw=0)
    switches = [run.switch for run in group.runs if run.switch]
    if len(switches) == len(group.runs):
        after = scale * fmean(_after(switch, measure) for switch in switches)
        first, *_ = (line["round"] for line in group.runs[0].rounds if line["phase"] == group.runs[0].phases[-1])
        spots = [at for at, mean in zip(x, means, strict=True) if mean.at[0].round == first - 1]
        axes.plot(spots, [after] * len(spots), "v", markersize=5, color=color, markerfacecolor=PAPER)


def _after(switch: Mapping[str, Any], measure: str) -> float:
    return float(switch["accuracy_after"]) if measure == "accuracy" else perplexity(switch["loss_after"])


def _legend(drawing: Drawing, keys: Sequence[Line2D | Patch]) -> None:
    widest = max(len(str(key.get_label())) for key in keys)
    if len(keys) > 1:
        drawing.legend(handles=list(keys), loc="outside lower left", ncols=1 if widest > 24 else 2 if widest > 12 else 4, handlelength=2.2)


def totals(runs: Mapping[str, Run], folder: Path, name: str) -> Figure:
    """Draw what one client exchanges in all rounds, a bar for each run, stacked by phase."""
    bills = {label: client_by_phase(run) for label, run in runs.items()}
    phases = list(dict.fromkeys(phase for bill in bills.values() for phase, _ in bill))
    with matplotlib.rc_context(STYLE):
        drawing = _drawing(0.9 + 0.36 * len(bills))
        axes = drawing.add_subplot()
        for at, (label, bill) in enumerate(bills.items()):
            end = _stack(axes, at, [(phases.index(phase), count / 1e6) for phase, count in bill])
            axes.text(0, at - 0.34, f"{label}: {nbytes(end * 1e6)}", va="center", fontsize=7.5)
        axes.set(xlabel=NAMES["client"], yticks=[], ylim=(len(bills) - 0.5, -0.6))
        axes.xaxis.set_major_formatter("{x:,g}")
        _legend(drawing, [Patch(color=COLOURS[at % 7], label=phase) for at, phase in enumerate(phases)])
    source = "ledger.jsonl: payload_bytes / clients by phase, for one client that takes part in every round; first seed."
    return _finish(drawing, folder, name, "Payload of one client by phase", source)


def _stack(axes: Axes, at: float, pieces: Sequence[tuple[int, float]]) -> float:
    """Draw pieces (colour number, length) one behind the other, and return where they end."""
    end = 0.0
    for colour, length in pieces:
        axes.barh(at, length, left=end, height=0.36, color=COLOURS[colour % 7])
        end += length
    return end


def kinds(run: Run, folder: Path, name: str) -> Figure:
    """Draw the payload of all clients, a bar for each phase and direction, stacked by kind."""
    sums = {key: count for key, count in traffic.by_kind(run.ledger).items() if key[1] != "control"}
    names = list(dict.fromkeys(kind for _, _, kind in sums))
    rows = [(phase, way) for phase in run.phases for way in ("down", "up")]
    with matplotlib.rc_context(STYLE):
        drawing = _drawing(1.1 + 0.26 * len(rows))
        axes = drawing.add_subplot()
        for at, row in enumerate(rows):
            _stack(axes, at, [(names.index(key[2]), count / 1e6) for key, count in sums.items() if key[:2] == row])
        axes.set(
            xlabel="MB of all clients", yticks=range(len(rows)), yticklabels=[" ".join(row) for row in rows], ylim=(len(rows) - 0.5, -0.5)
        )
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.grid(visible=False, axis="y")
        _legend(drawing, [Patch(color=COLOURS[at % 7], label=kind) for at, kind in enumerate(names)])
    return _finish(
        drawing, folder, name, "Payload by phase, direction and kind", "ledger.jsonl: bytes_by_kind, all rounds and ranks, without control."
    )


def timeline(run: Run, number: int, folder: Path, name: str, title: str) -> list[Figure]:
    """Draw one round as a Gantt chart, a row for each rank. Nothing where the run keeps no timeline."""
    bars = gantt.bars(run, number)
    if not bars:
        return []
    ranks = sorted({bar.rank for bar in bars})[:24]
    seen = [what for what in gantt.ACTIVITIES if any(bar.what == what for bar in bars)]
    with matplotlib.rc_context(STYLE):
        drawing = _drawing(1.2 + 0.25 * len(ranks))
        axes = drawing.add_subplot()
        for bar in bars:
            if bar.rank in ranks:
                axes.barh(ranks.index(bar.rank), bar.seconds, left=bar.begins, height=0.62, color=_activity(bar.what))
        axes.set(
            xlabel="seconds of the round",
            yticks=range(len(ranks)),
            yticklabels=[f"rank {rank}" for rank in ranks],
            ylim=(len(ranks) - 0.5, -0.5),
        )
        axes.grid(visible=False, axis="y")
        _legend(drawing, [Patch(color=_activity(what), label=what) for what in seen])
    source = (
        "timeline.jsonl and ledger.jsonl: began, seconds, wait_seconds. Times are on rank 0's clock: between hosts they are off by up "
        "to milliseconds. A collective that training interrupts has its seconds in the gaps."
    )
    return [_finish(drawing, folder, name, title, source)]


def _activity(what: str) -> str:
    colours: Mapping[str, int] = {"train": 0, "wait": 6, "move": 1, "aggregate": 2, "evaluate": 3, "switch": 4, "checkpoint": 5}
    return COLOURS[colours[what]] if what != "wait" else LINE


def energy(run: Run, folder: Path, name: str) -> list[Figure]:
    """Draw the share of the update's energy that the factors of each matrix keep. Nothing where there was no SVD."""
    kept = run.switch["kept_energy"] if run.switch else {}
    if not kept:
        return []
    names = _without_common_start(list(kept))
    with matplotlib.rc_context(STYLE):
        drawing = _drawing(0.8 + 0.155 * len(names))
        axes = drawing.add_subplot()
        axes.barh(range(len(names)), [100 * share for share in kept.values()], height=0.7, color=COLOURS[0])
        axes.set(xlabel="kept energy, %", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.grid(visible=False, axis="y")
    source = "summary.json: switch.kept_energy, the share of the update's squared norm that the factors of a matrix keep."
    return [_finish(drawing, folder, name, "Kept energy of each matrix", source)]


def _without_common_start(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    same = 0
    while len(names) > 1 and all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return [".".join(part[same:]) for part in parts]
