"""Dense layers by the fastest library at hand.

On CPUs torch gives float32 linear layers to MKL and convolutions to oneDNN. On AMD processors oneDNN is twice as fast, elsewhere MKL is, by
5 to 20 %; in bfloat16 both go to oneDNN. A linear layer is a convolution whose kernel is one point, so it can have the better one,
gradients included. The maker of the processor decides, not a measurement: the same machine must give the same bits every time.

Legend: T tokens of a batch, O/I out/in features.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from slora_dist.dropout import quick

Forward = Callable[[Tensor], Tensor]
_CPUS = Path("/proc/cpuinfo")
CONVOLVES = _CPUS.exists() and "AuthenticAMD" in _CPUS.read_text(encoding="utf-8", errors="replace")


def _as_it_is(y: Tensor) -> Tensor:
    return y


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tap: Forward = _as_it_is) -> Tensor:
    """Return ``x W^T + b`` for ``x`` of shape (..., I), as ``torch.nn.functional.linear`` does.

    ``tap`` is laid around the bare product, a tensor that nobody else holds yet, of shape (T, O) or (1, O, T, 1).
    """
    x_TI = x.reshape(-1, x.shape[-1])
    if CONVOLVES and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        pixels = x_TI[None, :, None].permute(0, 3, 1, 2)
        # a kernel of one point has nothing to dilate, but torch keeps small undilated ones from oneDNN
        y = tap(functional.conv2d(pixels, weight_OI[..., None, None], bias_O, dilation=2)).permute(0, 2, 3, 1)
    else:
        y = tap(functional.linear(x_TI, weight_OI, bias_O))
    return y.reshape(*x.shape[:-1], weight_OI.shape[0])


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


@contextmanager
def fast(net: nn.Module, own: Mapping[nn.Module, Forward] | None = None) -> Iterator[None]:
    """Let the plain linear layers of ``net`` compute by ``linear``, and the modules of ``own`` by the function given, until it is left.

    Dropout comes from ``dropout.py`` meanwhile.
    """
    forwards: dict[nn.Module, Forward] = {module: partial(_forward, module) for module in net.modules() if type(module) is nn.Linear}
    forwards |= own or {}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        with quick():
            yield
    finally:
        for module in forwards:
            del module.forward
