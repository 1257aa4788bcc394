"""From run folders to ``report.html`` (one file, no script, nothing fetched), ``report.md`` and ``figures/``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, product
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from slora_dist.errors import ConfigError
from slora_dist.links import check_rates
from slora_dist.log import say
from slora_dist.report import figures, gantt, tables
from slora_dist.report.blocks import NONE, Section, Table, duration, nbytes, percent
from slora_dist.report.curves import points
from slora_dist.report.predicted import measured, predicted
from slora_dist.report.read import Group, Run, group, load


@dataclass(frozen=True)
class Options:
    """What a report is asked for: accuracies to reach, client links in Mbit/s, and a machine's measured constants."""

    targets: Sequence[float] = (0.5,)
    mbit: Sequence[float] = (5.0,)
    machine: Path | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if not 0 < target <= 1:
                raise ConfigError("--target", f"{target:g} is no accuracy", "numbers above 0 and up to 1")
        check_rates(self.mbit)


def report(paths: Sequence[Path], out: Path, options: Options) -> Path:
    """Write the report of the runs at ``paths`` into the folder ``out`` and return the page's path. Raises ``ConfigError``."""
    groups = group([load(path) for path in _there(paths)])
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        sections = list(_sections(groups, out / "figures", options))
        (out / "report.md").write_text(markdown(sections), encoding="utf-8")
        (out / "report.html").write_text(html(sections), encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", f"{out} cannot be written ({error.strerror})", "a folder that you may write to") from None
    return out / "report.html"


def _there(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among several paths, and say what is none: ``runs/*`` has others, too."""
    if len(paths) == 1:
        return list(paths)
    found = [path for path in paths if (path / "config.json").exists()]
    if not found:
        raise ConfigError("RUN", f"none of {len(paths)} folders has a config.json", "folders of runs")
    for path in paths:
        if path not in found:
            say(0, f"{path} is left out: it has no config.json")
    return found


def html(sections: Sequence[Section]) -> str:
    """Return the page; every text is escaped, only the drawings are markup."""
    room = Environment(loader=PackageLoader("slora_dist.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    room.filters["runs_of_kind"] = lambda blocks: groupby(blocks, lambda block: isinstance(block, Table))
    return room.get_template("page.html").render(sections=sections, title=sections[0].title, markup=Markup)


def markdown(sections: Sequence[Section]) -> str:
    """Return the same as Markdown, its figures as links to the files."""
    lines: list[str] = []
    for at, section in enumerate(sections):
        lines += [f"{'##' if at else '#'} {_plain(section.title)}", ""] + [_plain(section.text), ""] * bool(section.text)
        lines += [f"- {_plain(what)}: {_plain(figure)}" for what, figure in section.tiles] + [""] * bool(section.tiles)
        for block in section.blocks:
            lines += [f"### {_plain(block.title)}", ""] * (block.title != section.title)
            lines += _rows(block) if isinstance(block, Table) else [f"![{_plain(block.title)}](figures/{block.name}.svg)"]
            lines += ["", f"Source: {_plain(block.source)}", ""]
    return "\n".join(lines)


def _rows(table: Table) -> list[str]:
    rule = ["---" if at < table.left else "---:" for at in range(len(table.columns))]
    return ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in (table.columns, rule, *table.rows)]


def _plain(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


# ---- what is on the page


def _sections(groups: Sequence[Group], folder: Path, options: Options) -> Iterator[Section]:
    panels = {name: [each for each in groups if each.panel == name] for name in dict.fromkeys(each.panel for each in groups)}
    yield _head(groups)
    yield from _scores(panels, folder)
    alike = {name: [each for each in members if each.finished] for name, members in panels.items()}
    if any(len(finished) > 1 for finished in alike.values()):
        blocks = [tables.equal(panels[name], name or "At equal budgets") for name, finished in alike.items() if len(finished) > 1]
        yield Section("At equal budgets", "What each had reached when it had spent what the most frugal spent in all.", blocks)
    costs = [tables.targets(members, options.targets, options.mbit, name or "Costs to an accuracy") for name, members in panels.items()]
    yield Section("Costs to an accuracy", "First measurements that reach it.", costs)
    yield _bytes(groups, folder)
    if any(run.switch for each in groups for run in each.runs):
        yield Section("The switch", "", [tables.switches(groups)])
    if any(run.personal for each in groups for run in each.runs):
        yield Section("On the clients' own documents", "", [tables.personal(groups)])
    if any(run.privacy for each in groups for run in each.runs):
        yield Section("Differential privacy", "", [tables.privacy(groups)])
    for at, each in enumerate(groups, 1):
        if each.runs[0].rounds:
            yield _detail(each, at, folder, options, folded=len(groups) > 2)
    if len(groups) > 1:
        yield Section("Settings that differ", "", [tables.settings(groups)], folded=len(groups) > 2)


def _head(groups: Sequence[Group]) -> Section:
    runs = [run for each in groups for run in each.runs]
    unfinished = sum(run.summary is None for run in runs)
    count = f"{len(runs)} runs" if len(runs) > 1 else "A run"
    text = f"{count} of federated fine-tuning, in {len(groups)} settings." if len(groups) > 1 else f"{count} of federated fine-tuning."
    if unfinished:
        text += f" Not finished: {unfinished}; named so, and shown up to the last round played."
    title = groups[0].runs[0].path.resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    return Section(f"Report: {title}", text, [tables.runs(groups)], tiles=_tiles(runs[0]) if len(runs) == 1 else ())


def _tiles(run: Run) -> list[tuple[str, str]]:
    end = points(run)[-1] if run.rounds else None
    share = tables.share_of_full(run)
    return [
        *([("test perplexity", perplexity)] if (perplexity := tables.perplexity(run)) != NONE else []),
        ("test accuracy", percent(tables.accuracy(run))),
        ("payload of one client", nbytes(end.client if end else None)),
        ("of full fine-tuning", percent(share, 2)),
        ("time, evaluation left out", duration(end.seconds if end else None)),
        ("rounds", f"{len(run.rounds)} of {run.planned}"),
    ]


def _scores(panels: dict[str, list[Group]], folder: Path) -> Iterator[Section]:
    for (at, (name, members)), measure in product(enumerate(panels.items(), 1), ("perplexity", "accuracy")):
        drawn, title = [], measure.capitalize()
        for axis, words in tables.AXES.items():
            drawn += figures.scores(members, measure, axis, folder, f"{measure}-{at}-{axis}", f"{title} by {words}")
        if drawn:
            key = figures.key(members) if len(members) > 1 else ()
            yield Section(f"{title}: {name}" if name else title, "", drawn, key=key)


def _bytes(groups: Sequence[Group], folder: Path) -> Section:
    bills = tables.bills(groups)
    drawn = [figures.totals(bills, folder, "payload")] if bills else []
    text = (
        "Payload is what clients exchange with the server, whatever the number of ranks. Transport is what ranks handed to the transport: "
        "nothing in a world of one, one copy of a broadcast for a rank that plays several clients. The kernel counts headers and "
        "acknowledgements, too."
    )
    return Section("Bytes", text, [*drawn, tables.payload(bills), tables.layers(groups)])


def _detail(each: Group, at: int, folder: Path, options: Options, folded: bool) -> Section:
    run = each.runs[0]
    drawn = [figures.kinds(run, folder, f"kinds-{at}")]
    for phase in run.phases:
        number = gantt.median_round(run, phase)
        title = f"Round {number}, the median of phase {phase}"
        drawn += figures.timeline(run, number, folder, f"timeline-{at}-{phase}", title)
    drawn += figures.energy(run, folder, f"energy-{at}")
    foretold = predicted(run, options.machine)
    counted = [tables.kinds(run), tables.bandwidth(run), *([tables.prediction(foretold, measured(run))] if foretold else [])]
    seed = f" Seed {run.config.run.seed} of {len(each.runs)} runs." if len(each.runs) > 1 else ""
    return Section(f"Inside: {each.label}", f"{tables.folder(run.path)}.{seed}", [*drawn, *counted], folded)
