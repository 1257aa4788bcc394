"""The rows of a source, and its columns as they are asked for: what is missing or empty is named by table, row and setting."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slora_dist.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """A ``pyarrow.Table``, with the names of the classes whose integers a column holds, if it tells them.

    ``coded`` columns hold values, or lists of them, that are written as JSON.
    """

    columns: Any
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    coded: frozenset[str] = frozenset()


def made(columns: Mapping[str, list[str]]) -> Rows:
    """Return rows of texts; not by ``pyarrow.array``, which imports pandas, half a second, to ask whether a list is one of its own."""
    import pyarrow

    return Rows(pyarrow.table({name: _strings(texts) for name, texts in columns.items()}))


def _strings(texts: list[str]) -> Any:
    import pyarrow

    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pyarrow.StringArray.from_buffers(len(texts), pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(encoded)))


@dataclass(frozen=True)
class Table:
    """One split of a source: its rows, the ``name`` that a user knows it by, and the ``setting`` that named it."""

    rows: Rows
    name: str
    setting: str

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise ConfigError(self.setting, f"{self.name} holds no documents", "at least one")

    def __len__(self) -> int:
        return len(self.rows.columns)


def values(table: Table, setting: str, column: str) -> list[Any]:
    """Return the values of ``column``; those that are missing are None. ``setting`` names the column. Raises ``ConfigError``."""
    if column not in table.rows.columns.column_names:
        raise ConfigError(setting, f"no column {column!r} in {table.name}", f"one of {', '.join(table.rows.columns.column_names)}")
    found: list[Any] = table.rows.columns[column].to_pylist()
    return [_decoded(value) for value in found] if column in table.rows.coded else found


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return None if value is None else json.loads(value)


def filled(table: Table, setting: str, column: str) -> list[Any]:
    """Return the values of ``column``, none of which may be missing. ``setting`` names the column. Raises ``ConfigError``."""
    found = values(table, setting, column)
    if None in found:
        raise ConfigError(setting, f"{column!r} is missing in row {found.index(None) + 1} of {table.name}", "a value in every row")
    return found


def texts(table: Table, setting: str, column: str) -> list[str]:
    """Return the texts of ``column``, none of which may be empty. Raises ``ConfigError``."""
    found = filled(table, setting, column)
    for row, text in enumerate(found, start=1):
        if not isinstance(text, str):
            raise ConfigError(setting, f"{column!r} of {table.name} holds {type(text).__name__}", "a column of text")
        if not text.strip():
            raise ConfigError(setting, f"the document in row {row} of {table.name} is empty", "a text in every row")
    return found
