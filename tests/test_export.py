"""What a run leaves is loaded by plain peft and transformers, and is the model that the run judged."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from slora_dist import adapters, methods, show
from slora_dist.adapters import ABOUT, DELTA
from slora_dist.cli import main
from slora_dist.config import Config
from slora_dist.data.federation import Federation
from slora_dist.data.tokens import Encoded, batches
from slora_dist.errors import RunError
from slora_dist.evaluate import evaluate
from slora_dist.model import load
from slora_dist.runfolder import RunFolder
from tests.tiny import SHORT, run, same

METHODS: dict[str, tuple[str, ...]] = {
    "slora": (),
    "primed_fft": ("method.name=primed_fft",),
    "lora": ("method.name=lora",),
    "residual kept": ("method.lowrank.residual=keep",),
    "remainder kept": ("method.lowrank.remainder=keep", "method.name=primed_fft"),
    "pissa": ("method.name=lora", "method.lowrank.init=pissa", "method.lowrank.alpha=7"),
    "scaled": ("method.lowrank.alpha=7", "method.lowrank.ranks={pooler.dense: 6}", "method.lowrank.split=sqrt"),
    "sft": ("method.name=sft",),
    "fft": ("method.name=fft",),
}
ADAPTERS = [name for name in METHODS if name not in ("sft", "fft")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A short run of every method, with enough training that logits differ from the base model's."""
    folder = tmp_path_factory.mktemp("exported")
    more = (*SHORT, "method.dense.rounds=2", "clients.epochs=3", "method.lowrank.lr=1e-2")
    return {name: run(folder / name.replace(" ", "-"), *more, *overrides) for name, overrides in METHODS.items()}


def held_out(config: Config) -> Encoded:
    return Federation(config, None).test()


@torch.no_grad()
def logits(net: nn.Module, documents: Encoded) -> Tensor:
    net.eval()
    return torch.cat([net(**{key: value for key, value in batch.items() if key != "labels"}).logits for batch in batches(documents, 40, 0)])


def as_judged(folder: RunFolder) -> nn.Module:
    """The run's own model: its base, its coordinates, the offset of its last checkpoint."""
    config, checkpoint = folder.config(), folder.latest()
    assert checkpoint
    classifier = load(config.model, Federation(config, None).names, config.run.seed)
    kept = folder.path / "checkpoint" / "base-1.safetensors"
    if kept.exists():
        with torch.no_grad():
            for name, weight in folder.load_base(1).items():
                classifier.net.get_parameter(name).copy_(weight)
    phase = config.method.resolved()[-1]
    coordinates = methods.support(phase, classifier, config.method, config.run.seed)
    methods.enter(phase, classifier, coordinates, config.run.seed)
    methods.reduce_base(phase, classifier)
    coordinates.write(classifier.net, coordinates.reference(classifier.net) + checkpoint.tensors["offset"])
    return classifier.net


def check(net: nn.Module, folder: RunFolder) -> None:
    """Same logits as the run's own model, and the figures of summary.json."""
    documents, summary = held_out(folder.config()), folder.summary()
    torch.testing.assert_close(logits(net, documents), logits(as_judged(folder), documents), atol=2e-5, rtol=1e-4)
    score = evaluate(net, documents, 0)
    assert score.accuracy == summary["accuracy"]
    assert score.loss == pytest.approx(summary["loss"], rel=1e-5)


def plain(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", ADAPTERS)
def test_plain_peft_loads_the_adapter(name: str, runs: dict[str, RunFolder]) -> None:
    adapter = runs[name].adapter
    base = plain(adapter / "base")
    documents = held_out(runs[name].config())
    before = logits(base, documents)
    net = PeftModel.from_pretrained(base, adapter)
    check(net, runs[name])
    assert float((logits(net, documents) - before).abs().max()) > 1e-2, "the adapter does something"


@pytest.mark.parametrize("name", METHODS)
def test_merged_it_is_a_plain_transformers_model(name: str, runs: dict[str, RunFolder], tmp_path: Path) -> None:
    assert main(["export", str(runs[name].path), str(tmp_path / "merged"), "--merge"]) == 0
    check(plain(tmp_path / "merged"), runs[name])
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert words("the cat")["input_ids"] == AutoTokenizer.from_pretrained(runs[name].adapter)("the cat")["input_ids"]
    assert set(plain(tmp_path / "merged").config.id2label.values()) == {"animals", "cooking", "music", "weather"}


def test_an_exported_adapter_stands_on_its_own(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """Exported, it names its own copy of the base: the run folder may go."""
    assert main(["export", str(runs["residual kept"].path), str(tmp_path / "mine")]) == 0
    from peft import AutoPeftModelForSequenceClassification

    net = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "mine", num_labels=4)
    assert net.peft_config["default"].base_model_name_or_path == str(tmp_path / "mine" / "base")
    check(net, runs["residual kept"])


def test_what_cannot_be_exported_is_said(runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    unfinished = run(tmp_path / "unfinished", *SHORT, stop_after=1)
    cases = [(runs["lora"].path, "taken", "DEST"), (runs["lora"].path, "taken/file", "DEST"), (unfinished.path, "new", "RUN")]
    for source, destination, setting in cases:
        capsys.readouterr()
        assert main(["export", str(source), str(tmp_path / destination)]) == 2
        assert f"error: {setting}: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_base_that_is_gone_leaves_no_empty_folder(runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["sft"].path, copy)
    about = json.loads((copy / "adapter" / ABOUT).read_text())
    (copy / "adapter" / ABOUT).write_text(json.dumps(about | {"base": str(tmp_path / "gone")}))
    shutil.rmtree(copy / "adapter" / "base")
    assert main(["export", str(copy), str(tmp_path / "merged"), "--merge"]) == 2
    said = capsys.readouterr().err
    assert "cannot be loaded on its base (" in said and said.count("\n") == 1 and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", [ABOUT, DELTA])
def test_a_damaged_adapter_is_not_merged(name: str, runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["sft"].path, copy)
    (copy / "adapter" / name).write_bytes((copy / "adapter" / name).read_bytes()[:30])
    capsys.readouterr()
    assert main(["export", str(copy), str(tmp_path / "merged"), "--merge"]) == 2
    said = capsys.readouterr().err
    assert "error: --merge: " in said and str(copy) in said and said.count("\n") == 1


def test_a_run_is_finished_when_its_adapter_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the end costs the last writing, and no training."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("slora_dist.export.write", full)
        with pytest.raises(RunError, match=r"adapter cannot be written \(No space left on device\); --resume goes on"):
            run(tmp_path / "run", *SHORT)
    assert not (tmp_path / "run/summary.json").exists()
    assert same(run(tmp_path / "run", resume=True), run(tmp_path / "straight", *SHORT))
    with monkeypatch.context() as patch:
        patch.setattr("slora_dist.export.write", full)
        with pytest.raises(RunError, match="adapter cannot be written"):
            run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run/summary.json").exists(), "the adapter of a run that was finished is written anew, too"


def test_a_run_is_loaded_by_its_folder_and_tells_its_base(runs: dict[str, RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    check(adapters.load(runs["lora"].path), runs["lora"])
    show.finished(runs["lora"], runs["lora"].summary())
    assert f"adapter  {runs['lora'].adapter}, on the weights in its base/\n" in capsys.readouterr().out
