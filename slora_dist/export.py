"""What comes out of a run, in the formats that others load: a PEFT adapter, or a plain transformers model; bottleneck adapters are our own.

An adapter stands on a base. When the base is not what a folder or hub name holds bit for bit (random weights, a kept residual, a head that
peft cannot tell from its targets), it is saved beside the adapter. Phases that move the base's own weights (sparse, dense, BitFit) leave a
delta: by how much the changed entries have moved, and the head as it is. ``adapters.py`` loads all of them again.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from slora_dist import adapters, methods
from slora_dist.adapters import ABOUT, BOTTLENECK, DELTA, LORA
from slora_dist.config import HoulsbyPhase, LowrankPhase, PfeifferPhase
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel, cause, head_parameters
from slora_dist.support import Support

TASKS = {"classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM}


@dataclass(frozen=True)
class Result:
    """The end of a run: the last phase, its coordinates and offset, on a classifier whose base weights are those it stands on."""

    phase: methods.AnyPhase
    classifier: TaskModel
    coordinates: Support
    offset_N: Tensor
    base_changed: bool
    tokenizer: Any


def write(result: Result, folder: Path) -> None:
    """Write the adapter or delta, with its base where that is needed, into ``folder``; the classifier is used up."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    net, source = result.classifier.net, result.classifier.source
    delta = {name: tensor.cpu() for name, tensor in result.coordinates.densify(result.offset_N.cpu()).items()}
    is_bottleneck = isinstance(result.phase, HoulsbyPhase | PfeifferPhase)
    if is_bottleneck:
        save_file(_moved(net, delta, delta), folder / BOTTLENECK)
    methods.remove_adapters(net)
    folded = isinstance(result.phase, LowrankPhase) and not _head_settings(result.classifier)
    if folded:
        for name in head_parameters(result.classifier):
            _assign(net, name, net.get_parameter(name).detach().cpu() + delta.pop(name))
    if source is None or result.base_changed or folded:
        net.save_pretrained(folder / "base")  # type: ignore[operator]
        source = str((folder / "base").resolve())
    result.tokenizer.save_pretrained(folder)
    about: dict[str, Any] = {
        "task": result.classifier.task,
        "base": source,
        "phase": result.phase.model_dump(),
        "head": result.classifier.head,
        "pad": net.config.pad_token_id,  # type: ignore[union-attr]
    }
    about["id2label"] = net.config.id2label  # type: ignore[union-attr]
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if isinstance(result.phase, LowrankPhase):
        _write_lora(result.phase, result.classifier, delta, source, folder)
    elif not is_bottleneck:
        _write_delta(result, delta, folder)


def export(adapter: Path, destination: Path, merge: bool) -> None:
    """Copy a run's adapter to ``destination``, or with ``merge`` write a plain transformers model there.

    Raises ``ConfigError`` when there is no adapter, the destination is taken, or the adapter cannot be merged.
    """
    form = adapters.form(adapter)
    if merge and form == BOTTLENECK:
        problem = "bottleneck adapters cannot be merged: a non-linearity stands between their projections"
        raise ConfigError("--merge", problem, "no --merge; slora_dist.adapters.load(DEST) loads them")
    net: Any = _loaded(adapter) if merge else None  # before there is a folder that would be left empty
    _make(destination)
    if not merge:
        _copy(adapter, destination)
        return
    (net.merge_and_unload() if form == LORA else net).save_pretrained(destination)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(destination)


def _loaded(adapter: Path) -> nn.Module:
    try:
        return adapters.load(adapter)
    except ConfigError:
        raise
    except Exception as error:  # whatever the libraries say of a base that is not there, or another one by now, and of damaged files
        allowed = "an adapter as it was written, on a base that is there; or no --merge"
        raise ConfigError("--merge", f"{adapter} cannot be loaded on its base ({cause(error)})", allowed) from None


def _make(destination: Path) -> None:
    try:
        destination.mkdir(parents=True, exist_ok=True)
        taken = any(destination.iterdir())
    except OSError as error:
        raise ConfigError("DEST", f"{destination} cannot be made ({error.strerror})", "a new folder") from None
    if taken:
        raise ConfigError("DEST", f"{destination} is not empty", "a new folder")


def _write_lora(phase: LowrankPhase, classifier: TaskModel, delta: Mapping[str, Tensor], source: str, folder: Path) -> None:
    settings = _head_settings(classifier) | methods.lora_settings(phase, classifier)
    config = LoraConfig(base_model_name_or_path=source, inference_mode=True, **settings)
    head = _moved(classifier.net, delta, [name for name in head_parameters(classifier) if name in delta])
    classifier.net.name_or_path = source  # type: ignore[assignment]  # peft notes it as the adapter's base
    wrapped = get_peft_model(classifier.net, config)
    for name, tensor in {**delta, **head}.items():
        _assign(wrapped.base_model.model, name, tensor)
    wrapped.save_pretrained(folder)
    _sort_lists(folder / LORA)


def _head_settings(classifier: TaskModel) -> dict[str, Any]:
    """Return peft's settings of the head, none where peft would take other modules for it.

    It takes whatever ends in the names that it is given, and in two more for a classifier: ``classifier`` is ``pre_classifier``, too.
    """
    endings = (*classifier.head, *(("classifier", "score") if classifier.task == "classification" else ()))
    if {name for name, _ in classifier.net.named_modules() if name.endswith(endings)} == set(classifier.head):
        return {"task_type": TASKS[classifier.task], "modules_to_save": list(classifier.head) or None}
    return {}


def _moved(net: nn.Module, delta: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return parameters of the base as they are after the run."""
    return {name: net.get_parameter(name).detach().cpu() + delta[name] for name in names}


def _sort_lists(path: Path) -> None:
    """Write a JSON object with its lists of names sorted: peft keeps them as sets, whose order differs from process to process."""
    about = json.loads(path.read_text(encoding="utf-8"))
    tidy = {key: sorted(set(value)) if isinstance(value, list) else value for key, value in about.items()}
    path.write_text(json.dumps(tidy, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _assign(net: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter by the name it has without peft's wrapper around the head."""
    module, _, leaf = name.rpartition(".")
    for depth in range(module.count(".") + 1, 0, -1):
        outer, inner = ".".join(module.split(".")[:depth]), ".".join(module.split(".")[depth:])
        holder = net.get_submodule(outer)
        if hasattr(holder, "modules_to_save"):
            module = ".".join(part for part in (outer, "modules_to_save.default", inner) if part)
            break
    net.get_parameter(f"{module}.{leaf}").copy_(tensor)


def _write_delta(result: Result, delta: Mapping[str, Tensor], folder: Path) -> None:
    tensors = _moved(result.classifier.net, delta, head_parameters(result.classifier))
    for slot, span in result.coordinates.spans():
        if slot.name in tensors:
            continue
        tensors[f"{slot.name}.values"] = result.offset_N[span].cpu().clone()
        if slot.index is not None:
            tensors[f"{slot.name}.index"] = slot.index.int()
    save_file(tensors, folder / DELTA)


def _copy(adapter: Path, destination: Path) -> None:
    shutil.copytree(adapter, destination, dirs_exist_ok=True)
    path = destination / LORA
    if path.exists() and (destination / "base").exists():
        about = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": str((destination / "base").resolve())}
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
