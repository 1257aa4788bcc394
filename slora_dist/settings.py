"""From a YAML file and dotted overrides to a ``Config``, and from the definitions to their documentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slora_dist.config import Config, Phase, SparsePhase
from slora_dist.errors import ConfigError
from slora_dist.section import Section, explain


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at ``path``, lay ``section.key=value`` overrides over it, and validate. Raises ``ConfigError``."""
    tree = read_mapping(path, Config, "settings", "settings")
    for override in overrides:
        _lay_over(tree, override)
    return validate(tree)


def read_mapping(path: str | Path, section: type[Section], content: str, form: str) -> dict[str, Any]:
    """Return the mapping that the YAML file at ``path`` holds; ``content`` and ``form`` name it in errors. Raises ``ConfigError``."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error.__class__.__name__})", "a readable YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, brackets without end
        raise ConfigError(str(path), f"is not YAML: {' '.join(str(error).split())}", f"a YAML file of {form}") from None
    if not isinstance(tree, dict):
        raise ConfigError(str(path), f"holds no {content}", f"a mapping with {', '.join(section.model_fields)}")
    return tree


def validate(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values, as it is read from YAML or from a run's ``config.json``. Raises ``ConfigError``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Config) from None


def _lay_over(tree: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise ConfigError(override, "is no override", "section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(name, f"{text!r} is not a YAML value", "a number, a word, a list in [], a mapping in {}") from None
    *parents, last = name.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) and part.isdigit() and int(part) < len(node) else _child(node, part, name)
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(name, "leads into a plain value", "a dotted name of a setting")


def _child(node: Any, part: str, name: str) -> Any:
    if not isinstance(node, dict):
        raise ConfigError(name, "leads into a plain value", "a dotted name of a setting")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def document() -> str:
    """Return the Markdown reference of all settings, made from their definitions."""
    lines = [
        "# Settings",
        "",
        "Made from the definitions in `slora_dist/config/`; a test keeps it true.",
        "Every setting can be given in YAML or as `section.key=value` on the command line.",
        "",
    ]
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        lines += [f"## {name}", "", (field.annotation.__doc__ or "").strip(), "", "| setting | default | meaning |", "|---|---|---|"]
        lines += [f"| `{dotted}` | {default} | {text} |" for dotted, default, text in _rows(field.annotation, f"{name}.")] + [""]
    return "\n".join(lines)


def _rows(section: type[Section], prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        shared = issubclass(section, Phase) and name in Phase.model_fields
        if isinstance(inner, type) and issubclass(inner, Section):
            rows += _rows(inner, f"{prefix}{name}.")
        elif name != "kind" and not (shared and section is not SparsePhase):
            dotted = f"method.<kind>.{name}" if shared else f"{prefix}{name}"
            rows.append((dotted, "needed" if field.is_required() else f"`{_plain(field.default)}`", field.description or ""))
    return rows


def _plain(value: Any) -> str:
    return "empty" if value is None else str(value)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Return ``config`` with ``section.key=value`` overrides laid over it. Raises ``ConfigError``."""
    tree = config.model_dump()
    for text in overrides:
        _lay_over(tree, text)
    return validate(tree)


def require_equal(config: Config, other: Config) -> None:
    """Raise ``ConfigError`` naming the first setting in which ``other`` differs from the ``config`` of a run that is resumed."""
    found = difference(config.model_dump(), other.model_dump())
    if found:
        name, has, given = found
        raise ConfigError(name, f"{given!r}, but the run that is resumed has {has!r}", "the settings of the run, or none")


def difference(tree: dict[str, Any], other: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first setting in which two trees of plain values differ: (dotted name, value in ``tree``, value in ``other``), or None."""
    has, given = (dict(_leaves(settings, "")) for settings in (tree, other))
    return next(((name, has.get(name), given.get(name)) for name in {**has, **given} if given.get(name) != has.get(name)), None)


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)]
