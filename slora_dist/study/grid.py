"""A study file and the cells of its grid: every combination of labels and seeds, and the settings that each one trains with."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from slora_dist import settings
from slora_dist.config import Config
from slora_dist.errors import ConfigError
from slora_dist.roundplan import check_world
from slora_dist.section import Positive, Real, Section, explain

Overrides = dict[str, Any]  # dotted setting -> value
Choice = dict[str, Any]  # axis -> label, or a list of labels
METHOD = "method"  # the axis along which tables compare


class StudyFile(Section):
    """A study."""

    base: str = Field(description="Settings file that every cell starts from, relative to the study file.")
    set: Overrides = Field({}, description="Dotted settings of every cell.")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="A list of run.seed values.")
    splits: dict[str, Overrides] = Field({}, description="Label -> dotted settings; the axis `split`.")
    methods: dict[str, Overrides] = Field({}, description="Label -> dotted settings; the axis `method`.")
    axes: dict[str, dict[str, Overrides]] = Field({}, description="Further axes: name -> label -> dotted settings.")
    only: list[Choice] = Field([], description="Cells to keep: axis -> label or labels.")
    skip: list[Choice] = Field([], description="Cells to leave out: axis -> label or labels.")
    targets: list[Annotated[Real, Field(gt=0, lt=1)]] = Field([], description="Accuracies, as fractions.")
    mbit: list[Positive] = Field([5.0], min_length=1, description="Rates of a client's link in Mbit/s.")
    ranks: int = Field(1, ge=1, description="Processes of a run: 1, or a server and its workers under torchrun.")


@dataclass(frozen=True)
class Cell:
    """One run of a study: ``labels`` maps each axis to a label; ``overrides`` lead from the base to ``config``."""

    labels: dict[str, str]
    seed: int
    overrides: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """The cell's folder within the study's: a label of each axis, then the seed."""
        return "/".join([*self.labels.values(), f"seed-{self.seed}"])


@dataclass(frozen=True)
class Study:
    """A study that has been read and checked. Seeds are outermost in ``cells``: stopped early, it has whole comparisons."""

    name: str
    base: Path
    cells: tuple[Cell, ...]
    targets: tuple[float, ...]
    mbit: tuple[float, ...]
    ranks: int


def read(path: str | Path) -> Study:
    """Read a study file and the settings of all its cells. Raises ``ConfigError`` naming the entry that does not fit."""
    file = _parse(Path(path))
    if repeated := [seed for at, seed in enumerate(file.seeds) if seed in file.seeds[:at]]:
        raise ConfigError("seeds", f"{repeated[0]} stands there twice", "each seed once")
    base = Path(os.path.normpath(Path(path).parent / file.base))
    axes = _axes(file)
    for name, choices in (("only", file.only), ("skip", file.skip)):
        _check_choices(name, choices, axes | {"seed": {str(seed): {} for seed in file.seeds}})
    cells = [
        _cell(base, file, axes, labels, seed)
        for seed in file.seeds
        for labels in _combinations(axes)
        if _wanted(file, labels | {"seed": str(seed)})
    ]
    if not cells:
        raise ConfigError("only", "leaves no cell", "at least one combination of labels")
    return Study(Path(path).stem, base, tuple(cells), tuple(file.targets), tuple(file.mbit), file.ranks)


def cell(study: Study, number: int) -> Cell:
    """Return a cell by its number, as a task of an array job knows it. Raises ``ConfigError`` when there is none."""
    if not 0 <= number < len(study.cells):
        raise ConfigError("--cell", f"{number} is no cell of {study.name}", f"0 to {len(study.cells) - 1}")
    return study.cells[number]


def _parse(path: Path) -> StudyFile:
    tree = settings.read_mapping(path, StudyFile, "study", "a study")
    try:
        return StudyFile.model_validate(tree)
    except ValidationError as error:
        raise explain(error, StudyFile) from None


def _axes(file: StudyFile) -> dict[str, dict[str, Overrides]]:
    """Return axis -> label -> overrides, in the order of a cell's folders."""
    short = {name: labels for name, labels in (("split", file.splits), (METHOD, file.methods)) if labels}
    twice = short.keys() & file.axes.keys()
    if twice or "seed" in file.axes:
        raise ConfigError(
            f"axes.{min(twice or {'seed'})}", "given twice", "another name: `splits`, `methods` and `seeds` have entries of their own"
        )
    axes = file.axes | short
    for name, labels in axes.items():
        if not labels:
            raise ConfigError(f"axes.{name}", "no labels", "label -> dotted settings")
        for label in labels:
            if not re.fullmatch(r"\w[\w.+-]*", label):
                raise ConfigError(f"axes.{name}", f"{label!r} cannot name a folder", "letters, digits and _ . + -")
    return axes


def _combinations(axes: Mapping[str, Mapping[str, Overrides]]) -> Iterator[dict[str, str]]:
    for labels in itertools.product(*axes.values()):
        yield dict(zip(axes, labels, strict=True))


def _labels(chosen: Any) -> list[str]:
    return [str(label) for label in (chosen if isinstance(chosen, list) else [chosen])]


def _check_choices(name: str, choices: Sequence[Choice], axes: Mapping[str, Mapping[str, Any]]) -> None:
    for at, choice in enumerate(choices):
        for axis, chosen in choice.items():
            if axis not in axes:
                raise ConfigError(f"{name}.{at}.{axis}", "no such axis", ", ".join(axes))
            for label in _labels(chosen):
                if label not in axes[axis]:
                    raise ConfigError(f"{name}.{at}.{axis}", f"no label {label!r}", ", ".join(axes[axis]))


def _wanted(file: StudyFile, labels: Mapping[str, str]) -> bool:
    def matches(choices: Sequence[Choice]) -> bool:
        return any(all(labels[axis] in _labels(chosen) for axis, chosen in choice.items()) for choice in choices)

    return (not file.only or matches(file.only)) and not matches(file.skip)


def _cell(base: Path, file: StudyFile, axes: Mapping[str, Mapping[str, Overrides]], labels: dict[str, str], seed: int) -> Cell:
    """Lay the overrides of all axes over the base: `set` first, then axis by axis, the seed last."""
    layers = {"set": file.set} | {f"{axis}.{label}": axes[axis][label] for axis, label in labels.items()} | {"seeds": {"run.seed": seed}}
    overrides = tuple(f"{name}={_text(value)}" for layer in layers.values() for name, value in layer.items())
    try:
        config = settings.load(base, overrides)
        check_world(config, file.ranks)
        return Cell(labels, seed, overrides, config)
    except ConfigError as error:
        blamed = [entry for entry, layer in layers.items() if any(_about(error.setting, name) for name in layer)]
        raise ConfigError(": ".join([*blamed[-1:], error.setting]), error.problem, error.allowed) from None


def _text(value: Any) -> str:
    """Return a value of the study file as the command line has it: YAML again, which is what it is read as."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).removesuffix("...\n").rstrip("\n")


def _about(setting: str, name: str) -> bool:
    return f"{setting}.".startswith(f"{name}.") or f"{name}.".startswith(f"{setting}.")
