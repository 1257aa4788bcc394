"""Our dropout is torch's in all but its bits: share, scale, gradient, and that a seed decides it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from slora_dist.dropout import LEVELS, dropout, quick

MANY = (1000, 1001)  # not a multiple of the four numbers that a draw gives


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_is_dropped_and_the_expectation_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kept = dropout(torch.ones(MANY, dtype=dtype), p)
    exact = round(p * LEVELS) / LEVELS
    assert kept.dtype == dtype and set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - exact), dtype=dtype).item()}
    count, gone = kept.numel(), (kept == 0).sum().item()
    assert abs(gone - count * exact) < 5 * math.sqrt(count * exact * (1 - exact))


def test_neighbours_are_independent() -> None:
    """Four numbers come from one draw, and rows follow each other: no lag may show."""
    torch.manual_seed(0)
    gone = (dropout(torch.ones(MANY), 0.3) == 0).flatten().double() - 0.3
    for lag in (1, 2, 3, 4, 5, MANY[1]):
        together = (gone[lag:] * gone[:-lag]).mean().item()
        assert abs(together) < 5 * 0.3 * 0.7 / math.sqrt(len(gone)), lag


def test_the_seed_decides_and_every_call_is_another() -> None:
    def twice() -> list[torch.Tensor]:
        torch.manual_seed(7)
        return [dropout(torch.ones(MANY), 0.1) for _ in range(2)]

    first, again = twice(), twice()
    assert all(map(torch.equal, first, again)) and not torch.equal(*first)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(MANY, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad * x, y)


@pytest.mark.parametrize("how", [{"p": 0.0}, {"p": 1.0}, {"p": 1e-7}, {"training": False}, {"inplace": True}])
def test_all_else_is_as_torch_has_it(how: dict[str, float]) -> None:
    torch.manual_seed(3)
    expected = functional.dropout(torch.ones(MANY), **how)  # type: ignore[arg-type]
    torch.manual_seed(3)
    assert torch.equal(dropout(torch.ones(MANY), **how), expected)  # type: ignore[arg-type]


def test_layers_drop_so_only_while_they_are_to() -> None:
    layer, usual = nn.Dropout(0.4), functional.dropout

    def drop() -> torch.Tensor:
        torch.manual_seed(1)
        dropped: torch.Tensor = layer(torch.ones(MANY))
        return dropped

    before = drop()
    with pytest.raises(ZeroDivisionError), quick():
        ours = drop()
        torch.manual_seed(1)
        assert torch.equal(ours, dropout(torch.ones(MANY), 0.4))
        raise ZeroDivisionError
    assert functional.dropout is usual and torch.equal(drop(), before) and not torch.equal(ours, before)
