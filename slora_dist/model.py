"""The model: where it comes from, which modules are its head, and which matrices LoRA may touch.

Legend: O/I out/in features of a matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from slora_dist.config import LowrankPhase, ModelConfig
from slora_dist.data.fetch import resolve
from slora_dist.errors import ConfigError
from slora_dist.seeding import derive

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

KINDS = {"classification": AutoModelForSequenceClassification, "causal_lm": AutoModelForCausalLM}
SHOWN = 200  # characters of what a library says that an error shows
WORDS = {"classification": "sequence classifier", "causal_lm": "causal language model"}


@dataclass(frozen=True)
class TaskModel:
    """A sequence classifier or causal language model.

    It is the network, the modules of its head, and whether plain transformers can load its base from ``source``.
    """

    net: nn.Module
    head: tuple[str, ...]
    source: str | None  # folder or hub name whose weights the backbone has bit for bit; None: the base has to be saved with the adapter
    task: str = "classification"  # a key of KINDS


def shell(config: ModelConfig, names: Sequence[str]) -> TaskModel:
    """Return the model without storage (on the meta device): shapes only, for planning."""
    with torch.device("meta"):
        net = _from_config(_settings(config, names), config)
    return TaskModel(net, _head(net, config), None, config.task)


def load(config: ModelConfig, names: Sequence[str], seed: int) -> TaskModel:
    """Load the model with float32 weights; what the pretrained model lacks is drawn from ``seed``, alike on every rank."""
    settings = _settings(config, names)
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "model"))
        if config.name is None:
            net, missing, other = _from_config(settings, config), None, {}
        else:
            net, info = _read(config, settings)
            other = {key: (tuple(there), tuple(here)) for key, there, here in info["mismatched_keys"]}
            missing = set(info["missing_keys"])
    head = _head(net, config)
    _check_fit(config, head, other)
    # whoever loads the base by its name gets it as it is: a network that other settings have changed is saved
    complete = missing is not None and not config.config and not other and all(_within(key, head) for key in missing)
    return TaskModel(net, head, _place(config.name) if complete and config.name else None, config.task)


def _check_fit(config: ModelConfig, head: Sequence[str], other: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Raise ``ConfigError`` when weights besides the head's, which is new where it tells other classes apart, have ``other`` shapes."""
    for name, (there, here) in other.items():
        if not _within(name, head):
            setting = "model.config" if config.config else "model.name"
            raise ConfigError(setting, f"{name} is {there} in {config.name!r}, and {here} here", "settings that fit the weights")


def _place(name: str) -> str:
    """Return where a model is: a folder's whole path, whatever folder one looks from later, or the hub name."""
    found = resolve(name, "models")
    return str(Path(found).resolve()) if Path(found).is_dir() else found


def tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the model, or None when its words are to be taken from the training texts."""
    name = config.tokenizer or config.name
    if name is None:
        return None
    folder = resolve(name, "models")
    try:
        words = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as in _from_config; also what the libraries raise that read it, or are not there
        setting = "model.tokenizer" if config.tokenizer else "model.name"
        raise ConfigError(setting, f"no tokenizer at {name!r} ({cause(error)})", "a folder or hub name with a tokenizer") from None
    if words.pad_token is None:  # GPT-like models have none; the attention mask hides whatever stands in for it
        words.pad_token = words.eos_token
    if words.pad_token is None:
        raise ConfigError("model.tokenizer", f"{name!r} has neither a pad nor an eos token", "a tokenizer with one of them")
    return words


def fit(classifier: TaskModel, words: PreTrainedTokenizerBase, max_length: int) -> None:
    """Make the model know the padding of its tokenizer. Raises ``ConfigError`` when vocabulary or length are above the model's."""
    whole: Any = classifier.net.config
    settings = whole.get_text_config()
    unused = _unused_positions(classifier.net)
    if not unused:  # else the network is built by its own, and would be another one when it is built again
        whole.pad_token_id = settings.pad_token_id = words.pad_token_id
    # added ones may be of a larger model of the family: documents have none of them (``Federation.vocabulary``)
    strange = any(at not in words.added_tokens_decoder for at in range(settings.vocab_size, len(words)))
    if strange or words.vocab_size > settings.vocab_size or words.pad_token_id >= settings.vocab_size:
        raise ConfigError("model.tokenizer", f"{len(words)} tokens for a model of {settings.vocab_size}", "the model's own tokenizer")
    positions = getattr(settings, "max_position_embeddings", None) or 0
    longest = min(positions - unused if positions > 0 else max_length, words.model_max_length)  # XLNet says -1: without end
    if max_length > longest:
        raise ConfigError("data.max_length", f"{max_length} tokens for a model of {longest}", f"2 to {longest}")


def vocabulary(classifier: TaskModel) -> int:
    """Return how many tokens the model knows."""
    return int(classifier.net.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]


def _unused_positions(net: nn.Module) -> int:
    """Return how many positions hold no token: RoBERTa and its kin count from behind that of the padding."""
    tables = (module for name, module in net.named_modules() if name.endswith("position_embeddings"))
    return max((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0)


def dense_layers(classifier: TaskModel) -> dict[str, tuple[int, int]]:
    """Return {module name: (O, I)} of every dense layer that is neither embedding (of input or output) nor head, in model order.

    A shared layer counts once.
    """
    layers, output = {}, classifier.net.get_output_embeddings()  # type: ignore[operator]
    for name, module in classifier.net.named_modules():
        name = name.removesuffix(".base_layer")
        if (
            isinstance(module, nn.Linear | Conv1D)
            and not _within(name, classifier.head)
            and "embedding" not in name
            and module is not output
            and not is_added(name)
        ):
            layers[name] = (module.weight.shape[1], module.weight.shape[0]) if isinstance(module, Conv1D) else tuple(module.weight.shape)
    return layers


def is_added(name: str) -> bool:
    """Whether a module or parameter has come into the network with a phase: a LoRA factor, a bottleneck adapter."""
    return "lora_" in name or "adapter" in name.split(".")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm of any kind."""
    return type(module).__name__.endswith("Norm")


def is_transposed(classifier: TaskModel, layer: str) -> bool:
    """Whether the layer stores its weight as I x O (GPT-2's Conv1D)."""
    module = classifier.net.get_submodule(layer)
    return isinstance(getattr(module, "base_layer", module), Conv1D)


def targets(classifier: TaskModel, phase: LowrankPhase) -> list[str]:
    """Return the module names of the layers that ``method.lowrank.targets`` names; ``ConfigError`` on one that is none."""
    layers = dense_layers(classifier)
    if phase.targets == "all":
        chosen = list(layers)
    elif phase.targets == "attention":
        chosen = [name for name in layers if any("att" in part for part in name.split("."))]
    else:
        chosen = [name for name in layers if ends(name, phase.targets)]
    unmatched = (
        [target for target in phase.targets if not any(ends(name, [target]) for name in layers)] if isinstance(phase.targets, list) else []
    )
    if unmatched or not chosen:
        raise ConfigError("method.lowrank.targets", f"no dense layer is named {unmatched or phase.targets}", ", ".join(_endings(layers)))
    return chosen


def ranks(classifier: TaskModel, phase: LowrankPhase) -> dict[str, int]:
    """Return {module name: rank} of the targets; ``ConfigError`` on names or ranks that do not fit."""
    layers, chosen = dense_layers(classifier), targets(classifier, phase)
    for ending in phase.ranks:
        if not _ends_any(chosen, ending):
            raise ConfigError(
                f"method.lowrank.ranks.{ending}", "no target has this ending", ", ".join(_endings({name: layers[name] for name in chosen}))
            )
    result = {name: next((rank for ending, rank in phase.ranks.items() if ends(name, [ending])), phase.rank) for name in chosen}
    for name, rank in result.items():
        if not 1 <= rank <= min(layers[name]):
            setting = "method.lowrank.rank" if rank == phase.rank else "method.lowrank.ranks"
            raise ConfigError(
                setting, f"rank {rank} is above the matrix {name} of {layers[name][0]} x {layers[name][1]}", f"1 to {min(layers[name])}"
            )
    return result


def head_parameters(classifier: TaskModel) -> list[str]:
    """Return the names of the head's parameters, in model order."""
    return [name for name, _ in classifier.net.named_parameters() if _within(name, classifier.head)]


def _settings(config: ModelConfig, names: Sequence[str]) -> Any:
    labels: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: at for at, name in enumerate(names)},
        "problem_type": "single_label_classification",  # whatever the checkpoint was for
    }
    if config.task == "causal_lm":
        labels = {}
    folder = resolve(config.name, "models") if config.name else None
    try:
        if folder is None:
            return AutoConfig.for_model(**(config.config | labels))
        return AutoConfig.from_pretrained(folder, **(config.config | labels))
    except Exception as error:  # whatever transformers and its checks raise on settings that no model has
        allowed = "a transformers model folder, hub name or model_type, and settings that it has"
        raise ConfigError(_blamed(config, error), f"no model ({cause(error)})", allowed) from None


def _from_config(settings: Any, config: ModelConfig) -> Any:
    try:
        return KINDS[config.task].from_config(settings, attn_implementation=config.attention, dtype=torch.float32)
    except Exception as error:  # also what torch raises on layers of no size
        allowed = f"a model with a {WORDS[config.task]}, and settings that fit together"
        raise ConfigError(_blamed(config, error), f"no model ({cause(error)})", allowed) from None


def _read(config: ModelConfig, settings: Any) -> Any:
    assert config.name is not None
    folder = resolve(config.name, "models")
    try:
        return KINDS[config.task].from_pretrained(
            folder,
            config=settings,
            dtype=torch.float32,
            attn_implementation=config.attention,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # looked at afterwards
        )
    except Exception as error:  # as in _from_config
        allowed = "a folder or hub name with safetensors weights, and settings that fit them"
        raise ConfigError(_blamed(config, error), f"{folder!r} cannot be loaded ({cause(error)})", allowed) from None


def _head(net: nn.Module, config: ModelConfig) -> tuple[str, ...]:
    children = [
        name for name, child in net.named_children() if name != net.base_model_prefix and next(child.parameters(), None) is not None
    ]
    if config.head is None:
        return () if config.task == "causal_lm" else tuple(children)
    modules = dict(net.named_modules())
    for name in config.head:
        if name not in modules or not name:
            raise ConfigError("model.head", f"no module is named {name!r}", ", ".join(children))
        if not any(_within(parameter, [name]) for parameter, _ in net.named_parameters()):
            raise ConfigError(
                "model.head", f"{name!r} has no weights of its own: they are tied to others", "a module with weights, or none"
            )
    return tuple(config.head)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def ends(name: str, endings: Sequence[str]) -> bool:
    """Whether a module's name is one of ``endings``, or ends in it after a dot."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _ends_any(names: Sequence[str], ending: str) -> bool:
    return any(ends(name, [ending]) for name in names)


def _endings(layers: dict[str, tuple[int, int]]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def _blamed(config: ModelConfig, error: Exception) -> str:
    """Return the setting that a model fails by: what was changed of it, unless its files cannot be read."""
    changed = bool(config.config) and not isinstance(error, OSError | SafetensorError)
    return "model.config" if changed or config.name is None else "model.name"


def cause(error: Exception) -> str:
    """Return what an error says, in one line; by its kind where it hardly says anything."""
    said = " ".join(str(error).split()).rstrip(".")
    said = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."  # transformers may go on with all models that it knows
    return said if isinstance(error, OSError | ValueError) else f"{error.__class__.__name__}: {said}"
