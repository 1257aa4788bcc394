"""The frozen base under what a phase adds to a network: names without adapters, weights that a switch folds in, the way back.

Names of base parameters are those of the plain network, whatever has been put around their layers since.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from slora_dist.model import TaskModel, is_added


def base_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the parameters of the plain network, in model order."""
    return {base_name(name): tuple(parameter.shape) for name, parameter in net.named_parameters() if not is_added(name)}


def base_name(name: str) -> str:
    """Return a parameter's name as it is without adapters."""
    return name.replace(".base_layer.", ".")


def parameter_name(name: str, net: nn.Module) -> str:
    """Return the name that the network has now for a base parameter: within an adapted layer it is ``layer.base_layer.weight``."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if hasattr(net.get_submodule(module), "base_layer") else name


def base_weights(classifier: TaskModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Return base parameters as they are now, by the names that they have without adapters."""
    return {name: classifier.net.get_parameter(parameter_name(name, classifier.net)).detach().clone() for name in names}


@torch.no_grad()
def add_to_base(classifier: TaskModel, change: Mapping[str, Tensor]) -> None:
    """Add updates to base parameters in place."""
    for name, update in change.items():
        parameter = classifier.net.get_parameter(parameter_name(name, classifier.net))
        parameter.add_(update.to(parameter.device))


def remove_adapters(net: nn.Module) -> None:
    """Put the plain layers back in the place of adapted ones."""
    for name, module in list(net.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.base_layer)
    net.__dict__.pop("peft_config", None)  # peft's note that it has been here
