"""Linear layers by convolution against torch's own. Legend: O/I out/in features."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slora_dist import linear as module
from slora_dist.linear import fast, linear

SHAPES = [(3, 6, 5, 4), (40, 24, 36), (700, 36), (1, 1, 36), (36,)]  # below and above the size from which torch asks oneDNN


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight_OI, bias_O), the first as strided as attention leaves it."""
    torch.manual_seed(0)
    x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    return x.requires_grad_(), torch.randn(8, shape[-1], requires_grad=True), torch.randn(8, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("convolves", [True, False])
def test_values_and_gradients_are_those_of_a_linear_layer(
    shape: tuple[int, ...], with_bias: bool, convolves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONVOLVES", convolves)
    x, weight_OI, bias_O = tensors(shape)
    chosen = (x, weight_OI, bias_O) if with_bias else (x, weight_OI)
    y, expected = linear(x, weight_OI, bias_O if with_bias else None), functional.linear(x, weight_OI, bias_O if with_bias else None)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(y)
    for found, reference in zip(torch.autograd.grad(y, chosen, upstream), torch.autograd.grad(expected, chosen, upstream), strict=True):
        torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-5)


def test_autocast_is_left_to_torch() -> None:
    x, weight_OI, bias_O = tensors((960, 36))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = linear(x, weight_OI, bias_O), functional.linear(x, weight_OI, bias_O)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


def test_plain_layers_are_fast_until_it_is_left() -> None:
    """Layers of other kinds, that may compute otherwise, keep their own forward."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(36, 16), Doubled(16, 4)), torch.randn(40, 24, 36)
    expected = net(x)
    with fast(net):
        assert ["forward" in vars(module) for module in net] == [True, False]
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(net(x), expected) and not any("forward" in vars(module) for module in net)
