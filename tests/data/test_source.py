import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from slora_dist.config import DataConfig
from slora_dist.data.source import Documents, _train, class_names, load_client, load_test, load_train
from slora_dist.data.table import values
from slora_dist.errors import ConfigError

ROWS: dict[str, list[Any]] = {"text": ["a ball", "a wall", "a hall"], "label": ["sport", "art", "sport"]}


def write(path: Path, columns: dict[str, list[Any]]) -> str:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict(columns).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        mark = "\t" if path.suffix == ".tsv" else ","
        cells = [columns, *(row.values() for row in rows)]
        path.write_text("".join(mark.join("" if cell is None else str(cell) for cell in line) + "\n" for line in cells))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(path: str, **settings: Any) -> tuple[Documents, list[str]]:
    return load_train(DataConfig(path=path, **settings), seed=0)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_each_format(tmp_path: Path, suffix: str) -> None:
    documents, names = train(write(tmp_path / f"d.{suffix}", ROWS))
    assert documents == Documents(ROWS["text"], [1, 0, 1]) and names == ["art", "sport"]
    assert [file.name for file in tmp_path.iterdir()] == [f"d.{suffix}"]


def test_other_column_names_and_clients(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", {"body": ["x", "y"], "topic": [1, 0], "who": [17, 4]})
    documents, names = train(path, text="body", label="topic", client_column="who")
    assert documents == Documents(["x", "y"], [1, 0], ["17", "4"]) and names == ["0", "1"]


def test_words_that_look_missing_are_text(tmp_path: Path) -> None:
    documents, names = train(write(tmp_path / "d.csv", {"text": ["null", "None"], "label": ["NA", "nan"]}))
    assert documents == Documents(["null", "None"], [0, 1]) and names == ["NA", "nan"]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_number_among_texts_is_refused(tmp_path: Path, suffix: str) -> None:
    """Readers of json may turn all texts of the column into quoted ones then."""
    with pytest.raises(ConfigError, match=r"^data\.(path|text): "):
        train(write(tmp_path / f"d.{suffix}", {"text": ["a ball", 2012, "a hall"], "label": ["sport", "art", "sport"]}))


def test_columns_that_datasets_writes_as_json_are_read(tmp_path: Path) -> None:
    if not hasattr(datasets, "Json"):
        pytest.skip("this version has no such columns")
    features = datasets.Features({"text": datasets.List(datasets.Json()), "label": datasets.Json()})
    turns = [[{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b"}]]
    datasets.Dataset.from_dict({"text": turns, "label": ["art"]}, features).save_to_disk(tmp_path / "saved")
    table = _train(str(tmp_path / "saved"), DataConfig(path="saved"))
    assert values(table, "data.text", "text") == turns and values(table, "data.label", "label") == ["art"]


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        (['"a ball\tsport', "a wall\tart", 'a "hall"\tsport'], ['"a ball', "a wall", 'a "hall"']),
        (['"a ball"\tsport', '"a ""wall"""\tart', "a hall\tsport"], ["a ball", 'a "wall"', "a hall"]),
        (['"a\nball"\tsport', "a wall\tart", "a hall\tsport"], ["a\nball", "a wall", "a hall"]),
    ],
    ids=["unquoted", "quoted", "line ends"],
)
def test_quotes_of_tsv_files(lines: list[str], texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text("\n".join(["text\tlabel", *lines, ""]))
    documents, names = train(str(tmp_path / "d.tsv"))
    assert documents == Documents(texts, [1, 0, 1]) and names == ["art", "sport"]


def test_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", {"text": ["x", "y", "z"], "label": [1, 5, 3]})
    assert train(path, labels=["1", "2", "3", "4", "5"])[0].labels == [0, 4, 2]
    assert train(path, labels=["5", "3", "1"])[0].labels == [2, 0, 1]
    assert train(path, labels=6)[0].labels == train(path)[0].labels == [1, 5, 3]
    with pytest.raises(ConfigError, match=r"label '5' .* is no known class. Allowed: one of 1, 2, 3"):
        train(path, labels=["1", "2", "3"])


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    train(write(path, ROWS))
    assert train(write(path, {"text": ["z", "y"], "label": ["art", "food"]}))[0].texts == ["z", "y"]


def test_folder_with_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "held.jsonl", {"text": ["a call"], "label": ["art"]})
    config = DataConfig(path=str(tmp_path), test_split="held")
    documents, names = load_train(config, seed=0)
    assert documents.texts == ROWS["text"]
    assert load_test(config, names, seed=0) == Documents(["a call"], [0])


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "train.parquet", "test.csv"):
        write(tmp_path / name, ROWS)
    with pytest.raises(ConfigError, match=r"^data\.path: .* has test\.csv, train\.csv, train\.parquet\. Allowed: one file for each split"):
        load_train(DataConfig(path=str(tmp_path)), seed=0)


def test_saved_dataset_keeps_its_class_names(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["sport", "art", "food"])
    rows = datasets.Dataset.from_dict(
        {"text": ["x", "y"], "label": [1, 0]}, datasets.Features({"text": datasets.Value("string"), "label": label})
    )
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    for folder in ("both", "one"):
        documents, names = train(str(tmp_path / folder))
        assert documents.labels == [1, 0] and names == ["sport", "art", "food"]
    assert train(str(tmp_path / "both"), labels=["art", "sport"])[0].labels == [0, 1]
    assert train(str(tmp_path / "both"), labels=5) == (Documents(["x", "y"], [1, 0]), ["0", "1", "2", "3", "4"])


def test_a_parquet_file_by_datasets_keeps_its_class_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sport", "art", "food"])})
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features)
    rows.to_parquet(tmp_path / "d.parquet")
    rows.cast_column("label", datasets.Value("int64")).to_pandas().to_parquet(tmp_path / "plain.parquet")
    assert train(str(tmp_path / "d.parquet")) == (Documents(["x", "y"], [1, 0]), ["sport", "art", "food"])
    assert train(str(tmp_path / "plain.parquet")) == (Documents(["x", "y"], [1, 0]), ["0", "1"])


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, subset: str | None) -> Any:
        asked.append((name, subset))
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert train("someone/news:small")[0].texts == train("someone/news")[0].texts == ROWS["text"]
    assert asked == [("someone/news", "small"), ("someone/news", None)]


def test_hub_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, subset: str | None) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"data\.path: someone/news cannot be loaded \(no route\)"):
        train("someone/news")


def test_toy() -> None:
    config = DataConfig(path="toy", client_column="client")
    documents, names = load_train(config, seed=0)
    assert names == ["animals", "cooking", "music", "weather"] and len(documents) == 240
    assert documents.clients is not None and len(set(documents.clients)) == 6
    assert len(load_test(config, names, seed=0)) == 80


def test_only_the_clients_own_file_is_opened(tmp_path: Path) -> None:
    write(tmp_path / "c1.csv", ROWS)
    config = DataConfig(path=str(tmp_path / "c{client}.csv"), labels=["art", "sport"], test_path="none.csv")
    assert load_client(config, 1, class_names(["art", "sport"])).labels == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"data\.path: .*c0\.csv does not exist"):
        load_client(config, 0, ["art", "sport"])


def test_integers_index_the_names(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", {"text": ["x", "y"], "label": [1, 0]})
    assert train(path, labels=["art", "sport"]) == (Documents(["x", "y"], [1, 0]), ["art", "sport"])


def test_limits_draw_by_the_seed_and_keep_the_order() -> None:
    config = DataConfig(path="toy", limit=50, test_limit=20, client_column="client")
    whole, names = load_train(DataConfig(path="toy", client_column="client"), seed=0)
    drawn, other = load_train(config, seed=0)[0], load_train(config, seed=1)[0]
    assert drawn == load_train(config, seed=0)[0] and drawn.texts != other.texts and len(drawn) == 50
    assert drawn.clients is not None and whole.clients is not None
    rows = iter(zip(whole.texts, whole.labels, whole.clients, strict=True))
    assert all(row in rows for row in zip(drawn.texts, drawn.labels, drawn.clients, strict=True))  # a subsequence
    assert len(load_test(config, names, seed=0)) == 20


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (ROWS, {"text": "body"}, r"data\.text: no column 'body' in .*d\.csv\. Allowed: one of text, label"),
        (ROWS, {"label": "topic"}, r"data\.label: no column 'topic'"),
        (ROWS, {"client_column": "who"}, r"data\.client_column: no column 'who'"),
        (
            ROWS,
            {"text": "label", "label": "text", "labels": ["art"]},
            r"data\.label: label 'a ball' in .* is no known class\. Allowed: one of art",
        ),
        (ROWS, {"labels": 2}, r"data\.labels: .*d\.csv names its classes"),
        (ROWS, {"labels": ["art", "art"]}, r"data\.labels: .* is no set of classes"),
        ({"text": ["x", "y"], "label": ["a", "a"]}, {}, r"data\.label: one class only, 'a'\. Allowed: two classes or more"),
        ({"text": ["x", "y"], "label": [0, 0]}, {}, r"data\.label: one class only, '0'"),
        ({"text": ["x", "y"], "label": [0, 0]}, {"labels": 1}, r"data\.labels: one class only, '0'"),
        ({"text": ["x", "y"], "label": [0, 4]}, {"labels": 4}, r"data\.label: label 4 in .*d\.csv is outside the range\. Allowed: 0 to 3"),
        ({"text": ["x", "y"], "label": [0, -1]}, {}, r"data\.label: label -1 in .* is outside the range\. Allowed: 0 to 0"),
        ({"text": ["x", "y"], "label": [0.5, 1.0]}, {}, r"data\.label: label 0\.5 in .* is a float"),
        ({"text": ["x", "y"], "label": [0, None]}, {}, r"data\.label: 'label' is missing in row 2"),
        ({"text": ["x", None], "label": [0, 1]}, {}, r"data\.text: 'text' is missing in row 2"),
        ({"text": ["x", " "], "label": [0, 1]}, {}, r"data\.text: the document in row 2 of .* is empty"),
        ({"text": [1, 2], "label": [0, 1]}, {}, r"data\.text: 'text' of .* holds int"),
        ({"text": ["x"], "label": [0], "who": [None]}, {"client_column": "who"}, r"data\.client_column: 'who' is missing in row 1"),
    ],
)
def test_mistakes_in_columns(tmp_path: Path, columns: dict[str, list[Any]], settings: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "d.csv", columns)
    with pytest.raises(ConfigError, match=message):
        train(path, **settings)


def test_missing_and_unreadable_sources(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (str(tmp_path / "no.csv"), "no.csv does not exist"),
        (str(tmp_path / "bad.parquet"), "bad.parquet cannot be read"),
        (str(tmp_path / "notes.txt"), "notes.txt has an unknown format"),
        (str(tmp_path / "empty"), "no documents in"),
    ]:
        with pytest.raises(ConfigError, match=rf"data\.path: .*{message}"):
            train(path)


def test_sources_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.csv").write_text("text,label\n")
    nothing = datasets.Dataset.from_dict({"text": [], "label": []})
    nothing.save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"data\.path: .*d\.csv cannot be read .* with documents in it"):
        train(str(tmp_path / "d.csv"))
    with pytest.raises(ConfigError, match=r"data\.path: .*saved cannot be read .* with documents"):
        train(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: {"train": nothing})
    with pytest.raises(ConfigError, match=r"data\.path: someone/news holds no documents"):
        train("someone/news")


def test_a_hub_set_that_is_a_script_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found news.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"data\.path: someone/news cannot be loaded \(Dataset scripts are no longer supported"):
        train("someone/news")


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", ROWS)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": path}, r"data\.test_path: missing, and .*train\.csv has no split to evaluate on"),
        ({"path": str(tmp_path)}, r"data\.test_path: missing, and .* has no split 'test'.* one of train"),
        ({"path": path, "test_path": str(tmp_path)}, r"data\.test_split: no split 'test'"),
        ({"path": path, "test_path": str(tmp_path / "no.csv")}, r"data\.test_path: .*no\.csv does not exist"),
    ]
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            load_test(DataConfig(**settings), ["art", "sport"], seed=0)
    with pytest.raises(ConfigError, match=r"data\.split: no split 'dev' in toy\. Allowed: one of train, test"):
        train("toy", split="dev")


def test_held_out_labels_are_checked_against_the_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", ROWS)
    with pytest.raises(ConfigError, match=r"data\.label: label 'sport' in .* is no known class\. Allowed: one of art, food"):
        load_test(DataConfig(path="toy", test_path=path), ["art", "food"], seed=0)
