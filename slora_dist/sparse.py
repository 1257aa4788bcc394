"""The training step of a mask: gradients at the kept entries only, so that their number sets the cost of everything but the two
products that no method can do without (a layer's output, and the gradient of its input).

The kept entries of a masked parameter train as one *leaf*, a vector. A linear layer or an embedding sends the gradient of its output
straight to the leaf; a gradient that reaches the whole parameter by another way (a bias, a norm, tied or transposed weights, a mask so
dense that the whole product is cheaper) is gathered into the leaf the moment it is there, and let go.

Legend: T tokens of a batch, t of a part of it, O/I out/in features, V/E rows and width of an embedding, r/c kept rows and columns, n kept
entries.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from slora_dist.linear import CONVOLVES, Forward, fast, linear
from slora_dist.support import Slot, Support

Gradient = Callable[[Tensor, Tensor], Tensor]  # (gradient of a layer's output, its input) -> gradient_n of the leaf

# up to this density the sampled product, which exists in float32 only, beats a whole one in the precision that is computed in
SAMPLED = {torch.float32: 0.12 if CONVOLVES else 0.05, torch.bfloat16: 0.03}

# the columns of a layer's input are read once an entry: of so many tokens at a time that all of them stay in the cache (half a MB)
CACHED, LEAST = 1 << 17, 64


@dataclass
class Leaves:
    """What an optimiser trains in place of a support's parameters: ``tensors`` has one leaf a slot, whole parameters being their own."""

    tensors: list[Tensor] = field(default_factory=list)
    masked: list[tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=list)  # with the leaf's flat positions, and the leaf

    @torch.no_grad()
    def settle(self) -> None:
        """Bring the leaves' values into the weights; no other weight moves by one bit."""
        for parameter, index_n, leaf_n in self.masked:
            parameter.view(-1).index_copy_(0, index_n, leaf_n)


@contextmanager
def training(net: nn.Module, support: Support) -> Iterator[Leaves]:
    """Let ``net`` bring its gradients to the leaves of ``support``, which have the net's values; all is as before when it is left."""
    leaves, own = Leaves(), dict[nn.Module, Forward]()
    with ExitStack() as stack:
        for slot in support.slots:
            parameter = slot.of(net)
            if slot.index is None:
                leaves.tensors.append(parameter)
                continue
            index_n = slot.index.to(parameter.device)
            leaf_n = slot.take(parameter).requires_grad_()
            leaves.tensors.append(leaf_n)
            leaves.masked.append((parameter, index_n, leaf_n))
            hook = parameter.register_post_accumulate_grad_hook(partial(_gather, index_n, leaf_n))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
            module, _, role = slot.name.rpartition(".")
            if role == "weight" and (forward := _forward(net.get_submodule(module), slot, leaf_n)):
                own[net.get_submodule(module)] = forward
        stack.enter_context(fast(net, own))
        yield leaves


def _gather(index_n: Tensor, leaf_n: Tensor, parameter: Tensor) -> None:
    """Move the kept entries of a whole gradient to the leaf."""
    assert parameter.grad is not None
    gradient_n = parameter.grad.reshape(-1).index_select(0, index_n)
    leaf_n.grad = gradient_n if leaf_n.grad is None else leaf_n.grad + gradient_n
    parameter.grad = None


def _forward(module: nn.Module, slot: Slot, leaf_n: Tensor) -> Forward | None:
    """Return how a layer computes whose weight trains at a slot's entries; None for layers of kinds that are not known here."""
    if type(module) is nn.Linear:
        if slot.axes is not None:
            return partial(_linear, module, leaf_n, _crossings(slot.axes, leaf_n.device))
        return partial(_sampled_linear, module, leaf_n, _sampled(slot, leaf_n), slot.count / module.weight.numel())
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
        return partial(_embedding, module, leaf_n, partial(_by_row, *_compressed(slot, leaf_n.device), module.padding_idx))
    return None


def _linear(module: nn.Linear, leaf_n: Tensor, gradient: Gradient, x: Tensor) -> Tensor:
    bias_O = None if module.bias is None else module.bias.detach()
    return linear(x, module.weight.detach(), bias_O, lambda y: _tap(y, leaf_n, module.bias, x.detach(), gradient))


def _sampled_linear(module: nn.Linear, leaf_n: Tensor, gradient: Gradient, density: float, x: Tensor) -> Tensor:
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if density > SAMPLED[dtype]:
        return linear(x, module.weight, module.bias)
    return _linear(module, leaf_n, gradient, x)


def _embedding(module: nn.Embedding, leaf_n: Tensor, gradient: Gradient, tokens: Tensor) -> Tensor:
    y_TE = functional.embedding(tokens.reshape(-1), module.weight.detach())
    return _tap(y_TE, leaf_n, None, tokens, gradient).view(*tokens.shape, -1)


def _tap(y: Tensor, leaf_n: Tensor, bias_O: Tensor | None, x: Tensor, gradient: Gradient) -> Tensor:
    tapped: Tensor = _Tap.apply(y, leaf_n, bias_O, x, gradient)  # type: ignore[no-untyped-call]
    return tapped


class _Tap(torch.autograd.Function):
    """Passes a layer's output on as it is, and the gradient that comes back to the layer's leaf and bias as well."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, leaf_n: Tensor, bias_O: Tensor | None, x: Tensor, gradient: Gradient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        ctx.mark_dirty(y)  # not a view: whoever gets it may add to it in place
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        last = grad.transpose(1, -1)  # linear's (1, O, T, 1) has its features in the middle
        grad_TO = last.reshape(-1, last.shape[-1])
        bias_O = grad_TO.sum(0).float() if ctx.needs_input_grad[2] else None
        # where grad was strided, grad_TO is its copy: handed on, so that nobody copies again
        return grad_TO.view(last.shape).transpose(1, -1), ctx.gradient(grad_TO, x), bias_O, None, None


def _crossings(axes: tuple[Tensor, Tensor], device: torch.device) -> Gradient:
    """Return the gradient of a linear layer's kept rows and columns: one small product, ``g_Tr^T x_Tc``."""
    rows_r, columns_c = (axis.to(device) for axis in axes)

    def gradient(grad_TO: Tensor, x: Tensor) -> Tensor:
        grad_Tr, x_Tc = _pick(grad_TO, rows_r), _pick(x.reshape(len(grad_TO), -1), columns_c)
        return (grad_Tr.t() @ x_Tc.to(grad_Tr.dtype)).reshape(-1).float()

    return gradient


def _pick(dense: Tensor, columns_c: Tensor) -> Tensor:
    """Return the columns of a matrix; ``gather`` takes them faster than ``index_select``, in bfloat16 by far."""
    return dense if len(columns_c) == dense.shape[1] else dense.gather(1, columns_c.expand(len(dense), -1))


def _compressed(slot: Slot, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each row of a slot's parameter begins among its kept entries, and the column of each of these."""
    assert slot.index is not None
    rows, columns = slot.shape
    starts = torch.searchsorted(slot.index, torch.arange(rows + 1) * columns)
    return starts.int().to(device), (slot.index % columns).int().to(device)


def _sampled(slot: Slot, leaf_n: Tensor) -> Gradient:
    """Return the gradient of a linear layer's kept entries: entry (o, i) is the dot product of two columns, ``g_To . x_Ti``."""

    @cache
    def pattern() -> Tensor:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch calls all of CSR a beta
            return torch.sparse_csr_tensor(*_compressed(slot, leaf_n.device), leaf_n.detach(), slot.shape)

    parts = partial(torch.split, split_size_or_sections=max(LEAST, CACHED // slot.shape[1]))

    def gradient(grad_TO: Tensor, x: Tensor) -> Tensor:
        product_OI = pattern_OI = pattern()
        for grad_tO, x_tI in zip(parts(grad_TO), parts(x.reshape(len(grad_TO), -1)), strict=True):
            grad_Ot, x_It = _turned(grad_tO.float()), _turned(x_tI.float())
            product_OI = torch.sparse.sampled_addmm(product_OI, grad_Ot, x_It.t(), beta=float(product_OI is not pattern_OI))
        return product_OI.values()

    return gradient


def _turned(dense: Tensor) -> Tensor:
    """Return the transpose of a matrix with its rows in one piece, as ``dense.t().contiguous()`` does number by number.

    Channels that are shuffled in groups of one row move in the same way, by a kernel that takes eight at a time.
    """
    height, width = dense.shape
    channels = dense.reshape(1, 1, 1, -1).permute(0, 3, 1, 2)
    return functional.channel_shuffle(channels, height).reshape(width, height)


def _by_row(starts: Tensor, columns_n: Tensor, padding: int | None, grad_TE: Tensor, tokens: Tensor) -> Tensor:
    """Return the gradient of an embedding's kept entries: those in the rows of this batch's tokens, zero elsewhere."""
    tokens_T = tokens.reshape(-1)
    first_T = starts[tokens_T]
    count_T = starts[tokens_T + 1] - first_T
    if padding is not None:
        count_T = count_T.masked_fill(tokens_T == padding, 0)
    # legend: m pairs of a token and a kept entry of its row
    token_m = torch.repeat_interleave(count_T)
    entry_m = torch.arange(len(token_m), device=grad_TE.device) + (first_T - count_T.cumsum(0) + count_T)[token_m]
    values_m = grad_TE[token_m, columns_n[entry_m]]
    return torch.zeros(len(columns_n), device=grad_TE.device).index_add_(0, entry_m, values_m.float())
