"""Documents with their classes, from a file, a ``datasets`` folder, a hub or the toy set; every mistake in them is named here.

The columns are checked as a whole before a limit is drawn, so that what a run accepts does not depend on its seed.
"""

import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from slora_dist.config import DataConfig
from slora_dist.data.fetch import resolve
from slora_dist.data.instructions import Reader, Span, Written
from slora_dist.data.permutation import subset
from slora_dist.data.table import Rows, Table, filled, made, texts
from slora_dist.data.toy import MADE
from slora_dist.errors import ConfigError
from slora_dist.seeding import derive

# pandas would read the words "NA" and "null" as missing, and a class may well be called that: only empty cells are missing
CSV = {"keep_default_na": False, "na_values": [""]}
# one number among texts would make all of them JSON in quotes: such a file is refused, as readers without these options do
JSON = {"on_mixed_types": None, "parse_agent_traces": False}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV),
    ".tsv": ("csv", {**CSV, "sep": "\t"}),
    ".json": ("json", JSON),
    ".jsonl": ("json", JSON),
    ".parquet": ("parquet", {}),
}
FORMATS = f"a {', '.join(READERS)} file, a `datasets` folder, a folder with train and test files, a hub name, or one of {', '.join(MADE)}"
BY_LABEL = ("dirichlet", "pathological")  # splits that ask for the labels of documents
UNLABELLED = ["document"]  # the one class of documents whose labels nobody asks for


@dataclass(frozen=True)
class Documents:
    """Texts with the index of their class, and the name of the client each belongs to, if that is known.

    Those of a causal language model have ``answers``, the spans that are learned, and may have their special tokens in them already.
    """

    texts: list[str]
    labels: list[int]
    clients: list[str] | None = None
    answers: list[list[Span]] | None = None
    complete: bool = False

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.labels) and (self.clients is None or len(self.clients) == len(self.texts))

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, part: Sequence[int]) -> "Documents":
        """Return the documents at the places ``part``, without the names of clients."""
        answers = None if self.answers is None else [self.answers[at] for at in part]
        return Documents([self.texts[at] for at in part], [self.labels[at] for at in part], None, answers, self.complete)


def class_names(labels: int | list[str]) -> list[str]:
    """Return the names of the classes that ``data.labels`` gives: its own, or "0" to "n-1". Raises ``ConfigError``."""
    names = [str(index) for index in range(labels)] if isinstance(labels, int) else labels
    if not names or len(set(names)) < len(names):
        raise ConfigError("data.labels", f"{labels} is no set of classes", "a number from 1, or names that differ")
    return names


def require_several(names: Sequence[str], setting: str) -> None:
    """Raise ``ConfigError`` where there is nothing to tell apart: transformers would take one class for a number to be met."""
    if len(names) < 2:
        raise ConfigError(setting, f"one class only, {names[0]!r}", "two classes or more")


def load_train(config: DataConfig, seed: int, read: Reader | None = None) -> tuple[Documents, list[str]]:
    """Read the training split of one source; return its documents and the class names in order. Raises ``ConfigError``.

    ``read`` makes documents of a causal language model of it: their labels count where the split is by label, and nowhere else.
    """
    table = _train(config.path, config)
    if read and config.partition not in BY_LABEL:
        return _documents(table, config, None, read, config.client_column, config.limit, derive(seed, "limit")), UNLABELLED
    if isinstance(config.labels, int) and _named(table, config):
        raise ConfigError("data.labels", f"{table.name} names its classes", "the list of names, in order")
    names = _found_names(table, config) if config.labels is None else class_names(config.labels)
    documents = _documents(table, config, names, read, config.client_column, config.limit, derive(seed, "limit"))
    if read is None:
        require_several(names, "data.label" if config.labels is None else "data.labels")
    return documents, names


def load_test(config: DataConfig, names: list[str], seed: int, read: Reader | None = None) -> Documents:
    """Read the held-out documents; ``names`` are the classes, as ``load_train`` returned them. Raises ``ConfigError``."""
    return _documents(_test(config), config, None if read else names, read, None, config.test_limit, derive(seed, "test_limit"))


def load_client(config: DataConfig, client: int, names: list[str], read: Reader | None = None) -> Documents:
    """Read the file of one client, and no other. Raises ``ConfigError``."""
    table = _train(config.path.replace("{client}", str(client)), config)
    return _documents(table, config, None if read else names, read, None, None, 0)


def _train(path: str, config: DataConfig) -> Table:
    splits = _open(path, "data.path")
    return Table(_pick(splits, config.split, path, "data.split"), path, "data.path")


def _test(config: DataConfig) -> Table:
    path, setting = (config.path, "data.path") if config.test_path is None else (config.test_path, "data.test_path")
    splits = _open(path, setting)
    if config.test_path is None and not isinstance(splits, dict):
        raise ConfigError("data.test_path", f"missing, and {path} has no split to evaluate on", FORMATS)
    if config.test_path is None and config.test_split not in splits:
        raise ConfigError(
            "data.test_path",
            f"missing, and {path} has no split {config.test_split!r}",
            f"a held-out source, or `data.test_split` one of {', '.join(splits)}",
        )
    return Table(_pick(splits, config.test_split, path, "data.test_split"), path, setting)


def _pick(splits: Any, split: str, path: str, setting: str) -> Rows:
    if not isinstance(splits, dict):
        return _rows(splits)
    if split not in splits:
        raise ConfigError(setting, f"no split {split!r} in {path}", f"one of {', '.join(splits)}")
    chosen = splits[split]
    return _rows(_read(chosen, setting) if isinstance(chosen, Path) else chosen)


def _rows(found: Any) -> Rows:
    """Return the rows of a ``datasets.Dataset``; what was read without that library is there already."""
    if isinstance(found, Rows):
        return found
    classes = {column: list(kind.names) for column, kind in found.features.items() if hasattr(kind, "names")}
    coded = frozenset(column for column, kind in found.features.items() if type(getattr(kind, "feature", kind)).__name__ == "Json")
    return Rows(found.with_format("arrow")[:], classes, coded)


def _open(path: str, setting: str) -> Any:
    """Return the rows at ``path`` (``Rows`` or a ``datasets.Dataset``), or a dict of splits: rows, or files that are still closed."""
    path = resolve(path, "data")
    if path in MADE:
        return {split: made(columns) for split, columns in MADE[path]().items()}
    place = Path(path)
    if place.is_dir():
        return _folder(place, setting)
    if place.suffix in READERS or place.is_absolute() or path.startswith("."):
        return _read(place, setting)
    return _hub(path, setting)


def _folder(folder: Path, setting: str) -> Any:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        datasets = _library()
        try:
            return datasets.load_from_disk(str(folder))
        except (OSError, ValueError, IndexError) as error:  # IndexError is what it says to a folder without rows
            raise ConfigError(
                setting, f"{folder} cannot be read ({_cause(error)})", "a folder with documents that `datasets` saved"
            ) from None
    found = [file for file in sorted(folder.iterdir()) if file.suffix in READERS]
    files = {file.stem: file for file in found}
    if not files:
        raise ConfigError(setting, f"no documents in {folder}", FORMATS)
    if len(files) < len(found):
        raise ConfigError(setting, f"{folder} has {', '.join(file.name for file in found)}", "one file for each split")
    return files


def _read(file: Path, setting: str) -> Any:
    if not file.exists():
        raise ConfigError(setting, f"{file} does not exist", FORMATS)
    if file.suffix not in READERS:
        raise ConfigError(setting, f"{file} has an unknown format", FORMATS)
    if file.suffix == ".parquet" and (rows := _parquet(file, setting)):
        return rows
    datasets = _library()
    builder, options = _reader(file)
    try:
        with tempfile.TemporaryDirectory() as cache:  # ranks share no cache, so they need no locks, and none goes stale
            return datasets.load_dataset(builder, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True, **options)
    except StopIteration:  # what the json reader says to an empty file
        raise ConfigError(setting, f"{file} holds no documents", "at least one") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(file, setting, error) from None


def _reader(file: Path) -> tuple[str, dict[str, Any]]:
    """Return the ``datasets`` builder that reads a file, and its options, as far as this version of it has them."""
    builder, options = READERS[file.suffix]
    if builder == "json":
        from datasets.packaged_modules.json.json import JsonConfig

        known = {field.name for field in fields(JsonConfig)}
        return builder, {name: value for name, value in options.items() if name in known}
    if file.suffix == ".tsv" and not _quoted(file):
        return builder, options | {"quoting": csv.QUOTE_NONE}
    return builder, options


def _quoted(file: Path) -> bool:
    """Whether the quotes of a file hold fields together, as those of csv files do; in most tsv files they are part of the text."""
    csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return len({len(row) for row in csv.reader(lines, delimiter="\t", strict=True) if row}) <= 1
    except (OSError, ValueError, csv.Error):
        return False


def _parquet(file: Path, setting: str) -> Rows | None:
    """Return the rows of a parquet file; None if ``datasets`` wrote it, which alone knows what its columns mean."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:  # read_table would import pandas, half a second, to do the same
            columns = opened.read()
    except (OSError, ValueError) as error:
        raise _unreadable(file, setting, error) from None
    return None if b"huggingface" in (columns.schema.metadata or {}) else Rows(columns)


def _unreadable(file: Path, setting: str, error: BaseException) -> ConfigError:
    return ConfigError(setting, f"{file} cannot be read ({_cause(error)})", f"a sound {file.suffix} file with documents in it")


def _library() -> Any:
    """Return ``datasets``, silenced. It is a fifth of all that a run imports, so that only those wait for it who read by it."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as errors comes back as exceptions, and these are told
    return datasets


def _hub(path: str, setting: str) -> Any:
    datasets = _library()
    name, _, subset_name = path.partition(":")
    try:
        return dict(datasets.load_dataset(name, subset_name or None))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a set that is a script
        raise ConfigError(setting, f"{path} cannot be loaded ({_cause(error)})", FORMATS) from None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:  # ``datasets`` wraps the reader's own words
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _documents(
    table: Table,
    config: DataConfig,
    names: Sequence[str] | None,
    read: Reader | None,
    client_column: str | None,
    limit: int | None,
    seed: int,
) -> Documents:
    written = read(table) if read else Written(texts(table, "data.text", config.text), None, False)
    labels = [0] * len(table) if names is None else _labels(table, config, names)
    clients = [str(client) for client in filled(table, "data.client_column", client_column)] if client_column else None
    kept = subset(len(labels), limit, seed).tolist()
    chosen = Documents(written.texts, labels, None, written.answers, written.complete).take(kept)
    return replace(chosen, clients=[clients[at] for at in kept] if clients else None)


def _named(table: Table, config: DataConfig) -> bool:
    return any(isinstance(label, str) for label in _raw_labels(table, config))


def _raw_labels(table: Table, config: DataConfig) -> list[Any]:
    """Return the labels as they stand, integers or names; the integers of a ``ClassLabel`` as its names, unless integers are asked for."""
    labels = filled(table, "data.label", config.label)
    own = table.rows.classes.get(config.label)
    if own is None or isinstance(config.labels, int):
        return labels
    return [own[label] if 0 <= label < len(own) else label for label in labels]


def _found_names(table: Table, config: DataConfig) -> list[str]:
    labels = _raw_labels(table, config)
    own = table.rows.classes.get(config.label)
    if own is not None:
        return own
    if labels and all(type(label) is int for label in labels):
        return class_names(max(labels) + 1)
    return sorted({label for label in labels if isinstance(label, str)})


def _labels(table: Table, config: DataConfig, names: Sequence[str]) -> list[int]:
    index, labels = {name: at for at, name in enumerate(names)}, _raw_labels(table, config)
    if list(names) != [str(at) for at in range(len(names))] and all(name.removeprefix("-").isdecimal() for name in names):
        labels = [str(label) if type(label) is int else label for label in labels]  # a csv file has no other way to write these names
    return [_index(label, index, table) for label in labels]


def _index(label: object, index: dict[str, int], table: Table) -> int:
    if isinstance(label, str):
        if label not in index:
            raise ConfigError("data.label", f"label {label!r} in {table.name} is no known class", f"one of {', '.join(index)}")
        return index[label]
    if type(label) is not int:
        raise ConfigError("data.label", f"label {label!r} in {table.name} is a {type(label).__name__}", "integers from 0, or names")
    if not 0 <= label < len(index):
        raise ConfigError("data.label", f"label {label} in {table.name} is outside the range", f"0 to {len(index) - 1}")
    return label
