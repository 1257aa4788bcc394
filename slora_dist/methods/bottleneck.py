"""Bottleneck adapters: two projections with a non-linearity between them, added to what a layer gives.

Houlsby et al. (2019, arXiv 1902.00751) put one on the output of the attention and one on the output of the feed-forward part, each before
the residual sum, and train the norms besides: ``norm(x + h + adapter(h))``. Pfeiffer et al. (2021, arXiv 2005.00247) have one after the
feed-forward part, which reads what the norm after it gives: with ``y = x + h`` the layer gives ``norm(y + adapter(norm(y)))``. Where no
norm follows (GPT-2, Llama), it stands on the output of the feed-forward part.

Legend: O features of a layer's output, S size of a bottleneck.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from slora_dist.config import HoulsbyPhase, PfeifferPhase
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel, dense_layers, ends, is_norm
from slora_dist.seeding import derive
from slora_dist.support import Slot

BottleneckPhase = HoulsbyPhase | PfeifferPhase

# How families name the last projections of the two parts of a layer, and the norm that follows the second.
ATTENTION_OUTPUTS = ("attention.output.dense", "attention.out_lin", "attention.dense", "attn.c_proj", "self_attn.o_proj")
FFN_OUTPUTS = ("output.dense", "ffn.lin2", "ffn_output", "mlp.c_proj", "mlp.down_proj")
FFN_NORMS = ("output.LayerNorm", "output_layer_norm", "full_layer_layer_norm")
_STD = 1e-2  # of a start near the identity (Houlsby et al.): normal, cut off at two standard deviations; biases are zero


class Adapter(nn.Module):
    """What is added: ``up(activation(down(h)))``."""

    def __init__(self, features: int, size: int, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, size), nn.Linear(size, features)
        self.activation = ACT2FN[activation]

    def forward(self, h: Tensor) -> Tensor:
        """Return the correction of ``h``."""
        added: Tensor = self.up(self.activation(self.down(h)))
        return added


class AdaptedDense(nn.Module):
    """A projection with an adapter on its output."""

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the projection, corrected."""
        h: Tensor = self.base_layer(x)
        corrected: Tensor = h + self.adapter(h)
        return corrected


class AdaptedNorm(nn.Module):
    """A norm with an adapter that reads what it gives, before the sum is normed once more."""

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def forward(self, y: Tensor) -> Tensor:
        """Return the norm of the corrected sum."""
        normed: Tensor = self.base_layer(y + self.adapter(self.base_layer(y)))
        return normed


def places(phase: BottleneckPhase, classifier: TaskModel) -> dict[str, int]:
    """Return {module name: O} of the layers that get an adapter, in model order. Raises ``ConfigError`` on an unknown family."""
    layers = {layer: out_features for layer, (out_features, _) in dense_layers(classifier).items()}
    attention = [layer for layer in layers if ends(layer, ATTENTION_OUTPUTS)]
    ffn = [layer for layer in layers if ends(layer, FFN_OUTPUTS) and layer not in attention]
    if not attention or not ffn:
        family = classifier.net.config.model_type  # type: ignore[union-attr]
        known = "a model with the layer names of BERT, RoBERTa, ALBERT, DistilBERT, GPT-2 or Llama"
        raise ConfigError("method.name", f"{phase.kind} finds no place for an adapter in a model of type {family}", known)
    if isinstance(phase, HoulsbyPhase):
        return {layer: features for layer, features in layers.items() if layer in {*attention, *ffn}}
    return dict(_norms_after(classifier)) or {layer: layers[layer] for layer in ffn}


def slots(phase: BottleneckPhase, classifier: TaskModel) -> list[Slot]:
    """Return the slots of all adapters, and of the norms where they train as well."""
    found = []
    for place, features in places(phase, classifier).items():
        shapes = {
            "down.weight": (phase.size, features),
            "down.bias": (phase.size,),
            "up.weight": (features, phase.size),
            "up.bias": (features,),
        }
        found += [Slot.whole(f"{place}.adapter.{leaf}", shape, "adapter") for leaf, shape in shapes.items()]
    if isinstance(phase, HoulsbyPhase) and phase.norms:
        found += [Slot.whole(name, shape, "norm") for name, shape in _norms(classifier)]
    return found


def insert(phase: BottleneckPhase, classifier: TaskModel, seed: int = 0) -> None:
    """Put the adapters into the network, with weights drawn from ``seed``, alike on every rank."""
    for place, features in places(phase, classifier).items():
        adapter = Adapter(features, phase.size, phase.activation)
        _reset(adapter, derive(seed, "adapter", place))
        layer = classifier.net.get_submodule(place)
        adapted = AdaptedNorm if is_norm(layer) else AdaptedDense
        parent, _, child = place.rpartition(".")
        setattr(classifier.net.get_submodule(parent), child, adapted(layer, adapter))


@torch.no_grad()
def _reset(adapter: Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for linear in (adapter.down, adapter.up):
        nn.init.trunc_normal_(linear.weight, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
        nn.init.zeros_(linear.bias)


def _norms(classifier: TaskModel) -> Iterator[tuple[str, Sequence[int]]]:
    for module_name, module in classifier.net.named_modules():
        if is_norm(module):
            yield from ((f"{module_name}.{leaf}", tuple(weight.shape)) for leaf, weight in module.named_parameters(recurse=False))


def _norms_after(classifier: TaskModel) -> Iterator[tuple[str, int]]:
    for name, module in classifier.net.named_modules():
        if is_norm(module) and ends(name, FFN_NORMS) and not ends(name, ("attention.output.LayerNorm",)):
            yield name, next(module.parameters()).numel()
