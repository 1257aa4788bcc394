"""What a run leaves in ``RUN/adapter``, loaded again: LoRA factors by peft, deltas and bottleneck adapters here.

The folder has ``slora_dist.json`` (task, the base that it stands on, the last phase, class names, the head's modules, the token that pads),
the tokenizer, and one of

- peft's ``adapter_config.json`` and ``adapter_model.safetensors`` (low-rank phases);
- ``delta.safetensors``: ``NAME.values`` to be added to a parameter, at ``NAME.index`` where not all of it moved (sparse, dense, BitFit),
  and the parameters ``NAME`` of the head as they are: the base may be a checkpoint without a head;
- ``bottleneck.safetensors``: the values of the adapters, the head and whatever else has trained (Houlsby, Pfeiffer).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from slora_dist.config import HoulsbyPhase, PfeifferPhase
from slora_dist.errors import ConfigError
from slora_dist.methods import insert_adapters
from slora_dist.model import KINDS, TaskModel

ABOUT, LORA, DELTA, BOTTLENECK = "slora_dist.json", "adapter_config.json", "delta.safetensors", "bottleneck.safetensors"


def load(folder: str | Path) -> nn.Module:
    """Return the network that a run judged, ready to evaluate, from ``RUN``, ``RUN/adapter`` or a copy of it.

    Raises ``ConfigError`` when there is no adapter, and what transformers and peft raise where the base is not to be had.
    """
    folder = Path(folder)
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    kind = form(folder)
    net: nn.Module = base(folder)
    if kind == LORA:
        net = PeftModel.from_pretrained(net, folder)
    elif kind == DELTA:
        _add_delta(net, load_file(folder / DELTA))
    else:
        about = _about(folder)
        phase = TypeAdapter[HoulsbyPhase | PfeifferPhase](HoulsbyPhase | PfeifferPhase).validate_python(about["phase"])
        insert_adapters(phase, TaskModel(net, tuple(about["head"]), None, about["task"]))
        _assign(net, load_file(folder / BOTTLENECK))
    return net.eval()


def form(folder: Path) -> str:
    """Return the file that tells what kind of adapter a folder holds. Raises ``ConfigError`` when it holds none."""
    for name in (LORA, DELTA, BOTTLENECK):
        if (folder / name).exists():
            return name
    raise ConfigError("RUN", f"{folder} holds no adapter", "the folder of a finished run")


def base(folder: Path) -> Any:
    """Load the base that an adapter folder stands on, with the run's classes."""
    about = _about(folder)
    labels = {int(at): name for at, name in about["id2label"].items()}
    source = folder / "base" if (folder / "base").exists() else about["base"]
    classes = {"id2label": labels, "label2id": {name: at for at, name in labels.items()}} if about["task"] == "classification" else {}
    net = KINDS[about["task"]].from_pretrained(source, use_safetensors=True, dtype=torch.float32, **classes)
    # afterwards: what is built by it is the checkpoint's
    net.config.pad_token_id = net.config.get_text_config().pad_token_id = about.get("pad", net.config.pad_token_id)
    return net


def _about(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    return about


@torch.no_grad()
def _add_delta(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in net.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])
        elif f"{name}.values" in tensors:
            index = tensors.get(f"{name}.index", torch.arange(parameter.numel()))
            parameter.view(-1).index_add_(0, index.long(), tensors[f"{name}.values"])


@torch.no_grad()
def _assign(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        net.get_parameter(name).copy_(tensor)
