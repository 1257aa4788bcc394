"""Runs as the report reads them, and how they are told apart: seeds of the same settings form a group, named by what sets it apart."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slora_dist.aggregate.rules import behaviour
from slora_dist.config import Config
from slora_dist.errors import ConfigError
from slora_dist.runfolder import RECORDS, RunFolder
from slora_dist.settings import validate

Line = dict[str, Any]  # of a JSONL file
SILENT = {"run.seed", "run.device", "comm.backend", "comm.timeout"}  # settings that do not make it another experiment
SPLIT = ("data.partition", "data.alpha", "data.shards", "data.client_column")
FIRST = ("partition", "density", "mask", "rank")  # settings that people name a run by
LAST = ("rounds", "lr", "lr_decay")  # tuned along with something else: they name a group only where nothing else does
COLOURS, DASHES = 7, 4  # of the figures


@dataclass(frozen=True)
class Run:
    """One run folder, read: ``rounds`` are the lines of metrics.jsonl, ``summary`` is None while it is not finished."""

    path: Path
    config: Config
    world: dict[str, Any]
    rounds: list[Line]
    ledger: list[Line]
    timeline: list[Line]
    counters: list[Line]
    summary: dict[str, Any] | None

    @property
    def planned(self) -> int:
        """Rounds that the settings ask for."""
        return sum(phase.rounds for phase in self.config.method.resolved())

    @property
    def phases(self) -> list[str]:
        """Names of the phases that have begun, in order."""
        return list(dict.fromkeys(line["phase"] for line in self.rounds))

    @cached_property
    def client(self) -> dict[int, dict[str, int]]:
        """What one client that takes part in every round sends and receives: ``{round: {up, down}}`` in bytes.

        It is a share of the ledger's lines where the clients of a round all get the same messages. Where they do not, it is the plan's: of
        a client of the largest rank. Raises ``ConfigError`` when the plan's model or class names are not to be had here.
        """
        if not _differ(self.config):
            return _shares(self.ledger)
        from slora_dist.data.federation import class_names  # they bring transformers and peft
        from slora_dist.model import shell
        from slora_dist.plan import exchanges, one_client

        planned = one_client(exchanges(self.config, shell(self.config.model, class_names(self.config))).values())
        return {line["round"]: planned[line["round"]] for line in self.rounds}

    @property
    def switch(self) -> dict[str, Any] | None:
        """What was measured at the last switch between phases, once the run is finished."""
        return self.summary["switch"] if self.summary else None

    @property
    def privacy(self) -> dict[str, float] | None:
        """Epsilon after the last round, where noise is added."""
        return self.rounds[-1].get("privacy") if self.rounds else None

    @property
    def personal(self) -> dict[str, Any] | None:
        """The last scores on the clients' own held-out documents, where there are any."""
        found = [line["personal"] for line in self.rounds if line.get("personal", {}).get("count")]
        return found[-1] if found else None

    @property
    def state(self) -> str:
        """``finished``, or how far it got."""
        return "finished" if self.summary else f"unfinished, {len(self.rounds)} of {self.planned} rounds"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only. ``panel`` names the figure that it belongs to; ``colour`` and ``dash`` are numbers of styles."""

    name: str
    panel: str
    colour: int
    dash: int
    runs: tuple[Run, ...]
    facts: Mapping[str, str]

    @property
    def label(self) -> str:
        """The name that no other group has."""
        return f"{self.name} · {self.panel}" if self.panel else self.name

    @property
    def finished(self) -> bool:
        """Whether its runs are finished (all are, or none is)."""
        return self.runs[0].summary is not None


def _differ(config: Config) -> bool:
    """Whether a client gets other messages than another one of its round: by what it lacks, keeps to itself, or by its rank."""
    phases = config.method.resolved()
    return bool(config.clients.keep) or any(len(behaviour(phase).groups) > 1 or len(phase.portions) > 1 for phase in phases)


def _shares(ledger: Iterable[Line]) -> dict[int, dict[str, int]]:
    """Return for each round the bytes of each of its clients.

    A ledger line holds the messages of the ``clients`` that a rank plays, all of one size; a rank that plays any in the round has a line
    for every message that they get, one that hosts clients has those of the switch.
    """
    by_rank: dict[tuple[int, str, int], int] = {}
    for line in ledger:
        if line["direction"] != "control" and line["clients"]:
            key = (line["round"], line["direction"], line["rank"])
            by_rank[key] = by_rank.get(key, 0) + line["payload_bytes"] // line["clients"]
    found: dict[int, dict[str, int]] = {}
    for (number, direction, _), nbytes in by_rank.items():
        ways = found.setdefault(number, {"up": 0, "down": 0})
        ways[direction] = max(ways[direction], nbytes)
    return found


def load(path: Path) -> Run:
    """Read the run folder at ``path``. Raises ``ConfigError`` when it is none, or a file of it is damaged."""
    folder = RunFolder(path)
    try:
        head = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"cannot be read ({error.__class__.__name__})", "the folder of a run") from None
    if not (isinstance(head, dict) and {"settings", "world"} <= head.keys()):
        raise ConfigError(str(path), "has a config.json of something else", "the folder of a run")
    metrics, ledger, timeline, counters = (folder.lines(name) for name in RECORDS)
    summary = folder.summary() if (path / "summary.json").exists() else None
    return Run(path, validate(head["settings"]), head["world"], metrics, ledger, timeline, counters, summary)


def facts(run: Run) -> dict[str, str]:
    """Return what makes the run what it is, setting by setting: the phases as they were played, the split in one entry, no seed."""
    tree = run.config.model_dump()
    method = tree.pop("method")["name"]
    leaves = {key: _word(value) for key, value in _leaves(tree, "") if key not in SILENT and key not in SPLIT}
    kinds = [phase.kind for phase in run.config.method.resolved()]
    for at, phase in enumerate(run.config.method.resolved()):
        name = phase.kind if kinds.count(phase.kind) == 1 else f"{phase.kind} {at + 1}"
        leaves |= {f"method.{name}.{key}": _word(value) for key, value in phase.model_dump().items() if key != "kind"}
    world = {"ranks": str(run.world["size"]), "transport": str(run.world["transport"])}
    title = "+".join(kinds) if method == "custom" else method
    return {"method": title, "data.partition": split(run.config), **leaves, **world, "state": "" if run.summary else run.state}


def split(config: Config) -> str:
    """Return how the documents fall to the clients, in words."""
    data = config.data
    extra = {
        "dirichlet": f" {data.alpha:g}",
        "quantity": f" {data.alpha:g}",
        "pathological": f" {data.shards} shards",
        "natural": f" {data.client_column or 'files'}",
    }
    return data.partition + extra.get(data.partition, "")


def _leaves(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    pairs = ((f"{prefix}{key}", value) for key, value in tree.items())
    return [leaf for key, value in pairs for leaf in (_leaves(value, f"{key}.") if isinstance(value, dict) else [(key, value)])]


def _word(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def group(runs: Sequence[Run]) -> list[Group]:
    """Put seeds of the same settings together, name each group by the fewest facts that set it apart, and deal panels and colours.

    Groups on several data sets, splits or models get a panel for each where a panel then still has something to compare.
    """
    together: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        together.setdefault(tuple(facts(run).items()), []).append(run)
    members = [(dict(key), tuple(of_key)) for key, of_key in together.items()]
    tables = [table for table, _ in members]
    chosen = _telling(tables)
    places = [key for key in chosen if key.startswith(("data.", "model."))]
    panels = [", ".join(_short(key, table, tables, chosen) for key in places) for table in tables]
    if len(set(panels)) == len(panels):
        panels, places = [""] * len(tables), []
    names = [_name(table, [key for key in chosen if key not in places], tables) for table in tables]
    styles = _styles({name: table["method"] for name, table in zip(names, tables, strict=True)})
    rows = zip(names, panels, members, strict=True)
    return [Group(_with_state(name, table), panel, *styles[name], found, table) for name, panel, (table, found) in rows]


def _with_state(name: str, table: Mapping[str, str]) -> str:
    return f"{name}, {table['state']}" if table["state"] else name


def _styles(methods: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Return (colour, dash) of each name: colours alone where they suffice, else a colour for the method, a dash for the rest."""
    names, kinds = list(methods), list(dict.fromkeys(methods.values()))
    rest = {name: name.removeprefix(methods[name]) for name in names}
    variants = [variant for variant in dict.fromkeys(rest.values()) if variant]
    pairs = {name: (kinds.index(methods[name]), variants.index(rest[name]) if rest[name] else 0) for name in names}
    if len(names) > COLOURS >= len(kinds) and len(variants) <= DASHES and len(set(pairs.values())) == len(names):
        return pairs
    return {name: (at % COLOURS, at // COLOURS % DASHES) for at, name in enumerate(names)}


def _telling(tables: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys that, one after the other, tell more groups apart; those in ``FIRST`` are asked first, in ``LAST`` last."""
    every = dict.fromkeys(key for table in tables for key in table if key != "state")
    words = {key: key.rsplit(".", 1)[-1] for key in every}
    keys = sorted(every, key=lambda key: (words[key] in LAST, FIRST.index(words[key]) if words[key] in FIRST else len(FIRST)))
    chosen: list[str] = ["method"]
    apart = len({table["method"] for table in tables})
    for key in keys:
        now = len({tuple(table.get(name) for name in [*chosen, key]) for table in tables})
        if now > apart:
            chosen, apart = [*chosen, key], now
    return chosen


def _name(table: Mapping[str, str], chosen: Sequence[str], tables: Sequence[Mapping[str, str]]) -> str:
    """Name a group by its method and the facts that other groups of the method (or of all) have otherwise."""
    same = [other for other in tables if other["method"] == table["method"]]
    shown = [key for key in chosen[1:] if _varies(key, same if key.startswith("method.") else tables) and key in table]
    return ", ".join([table["method"], *(_short(key, table, tables, chosen) for key in shown)])


def _varies(key: str, tables: Sequence[Mapping[str, str]]) -> bool:
    return len({table.get(key) for table in tables}) > 1


def _short(key: str, table: Mapping[str, str], tables: Sequence[Mapping[str, str]], chosen: Sequence[str]) -> str:
    """Return ``density 0.1``, or the value where it speaks for itself; with its section where the last word alone is ambiguous."""
    if key in ("data.path", "model.name"):
        return _end(Path(table[key]), {Path(other[key]) for other in tables if key in other})
    if key == "data.partition" or key.endswith(".mask"):
        return table[key]
    twin = sum(other.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] for other in chosen) > 1
    words = key.removeprefix("method.") if twin else key.rsplit(".", 1)[-1]
    return f"{words} {table.get(key, 'none')}"


def _end(path: Path, every: Collection[Path]) -> str:
    """Return the shortest end of ``path`` that no other one of ``every`` has."""
    ends = (path.parts[-count:] for count in range(1, len(path.parts)))
    alone = (end for end in ends if sum(other.parts[-len(end) :] == end for other in every) == 1)
    return str(Path(*next(alone, path.parts)))


def differences(groups: Sequence[Group]) -> dict[str, dict[str, str]]:
    """Return every setting that two groups have otherwise: label of the group -> name -> value."""
    keys = dict.fromkeys(key for each in groups for key in each.facts if key != "state")
    varying = [key for key in keys if len({each.facts[key] for each in groups if key in each.facts}) > 1]
    return {each.label: {key: each.facts[key] for key in varying if key in each.facts} for each in groups}
