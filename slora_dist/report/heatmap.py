"""The picture of a split: clients x labels, and every client's documents above.

Legend: K clients, C classes.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slora_dist.data.overview import Overview
from slora_dist.errors import ConfigError
from slora_dist.report.figures import COLOURS, PAPER, STYLE

KINDS = (".png", ".svg", ".pdf")
CELL, LEAST, MOST = 0.3, 3.2, 12.0  # inches of a cell, and of the least and greatest side of the table
WRITTEN = 0.24  # inches from which a cell has room for its number


def check(path: Path) -> None:
    """Raise ``ConfigError`` when no picture can be written to ``path``."""
    if path.suffix not in KINDS:
        raise ConfigError("--plot", f"{path} is no kind of picture", f"a file that ends in {', '.join(KINDS)}")
    if not path.parent.is_dir():
        raise ConfigError("--plot", f"{path.parent} is no folder", "a file in a folder that there is")


def draw(found: Overview, title: str, path: Path) -> None:
    """Draw the split and write it to ``path``; the suffix says in which format."""
    clients, labels = found.counts_KC.shape
    width, height = (min(MOST, max(LEAST, CELL * count)) for count in (clients, labels))
    style = STYLE | {"axes.grid": False, "svg.hashsalt": "partition", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width + 2.6, height + 1.9), layout="constrained")
        above, table = figure.subplots(2, 1, sharex=True, height_ratios=(1.0, max(1.0, height)))
        above.set_title(title, loc="left", fontsize=10)
        above.bar(range(clients), found.counts_KC.sum(1), width=0.8, color=COLOURS[0])
        above.set_ylabel("documents")
        above.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        image = table.imshow(found.counts_KC.T, aspect="auto", cmap="Blues", norm=PowerNorm(0.5, 0, max(1, found.counts_KC.max())))
        table.set(xlabel="client", ylabel="label")
        table.xaxis.set_major_locator(MaxNLocator(min(clients, 20), integer=True))
        table.set_yticks(range(labels), found.names, fontsize=8 if height / labels > 0.13 else 5)
        figure.colorbar(image, ax=table, label="documents of a label", pad=0.01)
        if min(width / clients, height / labels) >= WRITTEN:
            _write_numbers(table, found)
        figure.savefig(path, facecolor=PAPER, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _write_numbers(table: Axes, found: Overview) -> None:
    greatest = found.counts_KC.max()
    for client, counts_C in enumerate(found.counts_KC):
        for label, count in enumerate(counts_C):
            if count:
                colour = PAPER if count > greatest / 3 else "black"
                table.text(client, label, f"{count}", ha="center", va="center", fontsize=6.5, color=colour)
