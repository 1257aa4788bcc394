"""What a report is made of: sections of tables and figures. ``page.py`` turns them into HTML and Markdown. And how figures are written."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from slora_dist.show import size

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``left`` columns are words, the others are numbers. ``source`` says which files and fields they are from."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: str
    left: int = 1


@dataclass(frozen=True)
class Figure:
    """A drawing: ``svg`` is its inline form, and files ``figures/<name>.svg`` and ``.png`` lie beside the page."""

    name: str
    title: str
    source: str
    svg: str


@dataclass(frozen=True)
class Swatch:
    """An entry of the key to the lines: number of the colour, SVG dashes, and what it stands for."""

    colour: int
    dashes: str
    label: str


@dataclass(frozen=True)
class Section:
    """A part of the page. ``folded`` ones open on a click."""

    title: str
    text: str = ""
    blocks: Sequence[Table | Figure] = ()
    folded: bool = False
    tiles: Sequence[tuple[str, str]] = ()  # (what, figure), shown large
    key: Sequence[Swatch] = ()


def percent(share: float | None, digits: int = 1) -> str:
    """Return ``57.3 %``."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def spread(values: Sequence[float | None]) -> str:
    """Return the mean of accuracies with their range, ``57.3 % (56.9-57.7)``, or a dash where one is missing."""
    found = [value for value in values if value is not None]
    if not found or len(found) < len(values):
        return NONE
    return percent(fmean(found)) + (f" ({100 * min(found):.1f}-{100 * max(found):.1f})" if len(found) > 1 else "")


def nbytes(count: float | None) -> str:
    """Return ``12.3 MB`` (decimal units)."""
    return NONE if count is None else size(count)


def duration(seconds: float | None) -> str:
    """Return seconds for reading: ``12.3 s``, ``4.5 min``, ``2.0 h``."""
    if seconds is None:
        return NONE
    for limit, divisor, unit in ((100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.{2 if seconds < 10 else 1}f} {unit}"
    return f"{seconds / 3600:.1f} h"
