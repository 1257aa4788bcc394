"""A study's figures: accuracy by round and by minutes, and the distance to full fine-tuning; SVG and PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from slora_dist.study.grid import Study
from slora_dist.study.tables import Point, Row, rival

matplotlib.rcParams["svg.hashsalt"] = "slora_dist"  # the same study gives the same file
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # told apart by the colour-blind, too
STYLES = ("-", "--", ":", "-.")


def write(study: Study, folder: Path, found: Sequence[Row]) -> None:
    """Draw all figures of the rows that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(_curves(found, "round", lambda point: point.round, "linear"), folder / "accuracy_by_round")
    minutes = f"minutes of one client on a link of {study.mbit[0]:g} Mbit/s"
    _save(_curves(found, minutes, lambda point: point.minutes[0], "log"), folder / "accuracy_by_minutes")
    if any(rival(row, found) for row in found):
        _save(_gaps(found), folder / "gap_to_fft")


def _groups(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.group for row in found))


def _look(found: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Return colour and line style of each method, the same in every figure."""
    methods = list(dict.fromkeys(row.method for row in found))
    return {method: (COLORS[at % len(COLORS)], STYLES[at // len(COLORS) % len(STYLES)]) for at, method in enumerate(methods)}


def _curves(found: Sequence[Row], along: str, value: Callable[[Point], float], scale: str) -> Figure:
    groups, look = _groups(found), _look(found)
    figure = Figure(figsize=(1.5 + 4.5 * len(groups), 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(groups), squeeze=False, sharey=True)[0])
    for group, panel in zip(groups, panels, strict=True):
        panel.set(title=group, xlabel=along, xscale=scale)
        if scale == "log":
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        for row in found:
            if row.group == group:
                color, style = look[row.method]
                where, low, high = ([get(point) for point in row.points] for get in (value, lambda p: 100 * p.low, lambda p: 100 * p.high))
                panel.plot(where, [100 * point.accuracy for point in row.points], style, color=color, label=row.method)
                panel.fill_between(where, low, high, color=color, alpha=0.12, linewidth=0)
    panels[0].set_ylabel("test accuracy in %")
    _legend(figure, panels)
    return figure


def _gaps(found: Sequence[Row]) -> Figure:
    """Draw how far each method ends below full fine-tuning, in points of accuracy, group by group."""
    groups, look = _groups(found), _look(found)
    methods = [method for method in look if any(row.method == method and row.config.method.name != "fft" for row in found)]
    width = 0.8 / max(len(methods), 1)
    figure = Figure(figsize=(4 + 0.3 * len(methods) * len(groups), 4.2), layout="constrained")
    panel = figure.subplots()
    for at, method in enumerate(methods):
        pairs = [(row, rival(row, found)) for row in found if row.method == method]
        bars = [(groups.index(row.group), 100 * (fft.last.accuracy - row.last.accuracy)) for row, fft in pairs if fft]
        where = [group + (at - (len(methods) - 1) / 2) * width for group, _ in bars]
        color, style = look[method]
        hatch = "" if style == STYLES[0] else "//"
        panel.bar(where, [gap for _, gap in bars], 0.92 * width, color=color, edgecolor="white", hatch=hatch, label=method)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel("points below full fine-tuning")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    _legend(figure, [panel])
    return figure


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend beside the panels, with every method that any of them shows."""
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
