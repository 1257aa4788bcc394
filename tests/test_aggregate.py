"""The server against hand-written formulas (Reddi et al. 2021). Legend: N coordinates, K clients, T rounds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slora_dist.aggregate.mean import Mean
from slora_dist.aggregate.server import Server
from slora_dist.config import ServerConfig

N, T = 1000, 6
LR, B1, B2, TAU = 0.3, 0.9, 0.97, 0.01


def updates(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, N, generator=torch.Generator().manual_seed(seed))


def server(**settings: Any) -> Server:
    return Server(ServerConfig(**settings), updates(1, seed=1)[0])


@pytest.mark.parametrize("weights", [[1.0] * 5, [3.0, 1.0, 240.0, 17.0, 2.0]])
def test_mean_is_the_weighted_mean(weights: list[float]) -> None:
    delta_KN, mean = updates(5), Mean(N)
    for delta_N, weight in zip(delta_KN, weights, strict=True):
        mean.count(weight)
        for start in range(0, N, 300):
            mean.add(start, delta_N[start : start + 300], weight)
    expected_N = (delta_KN.double() * torch.tensor(weights).double()[:, None]).sum(0) / sum(weights)
    torch.testing.assert_close(mean.result().double(), expected_N, atol=1e-6, rtol=1e-5)


def test_mean_does_not_depend_on_where_messages_are_cut() -> None:
    results = []
    for step in (1, 64, N):
        mean = Mean(N)
        for delta_N in updates(4):
            mean.count(2.0)
            for start in range(0, N, step):
                mean.add(start, delta_N[start : start + step], 2.0)
        results.append(mean.result())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_sgd_with_lr_one_is_averaging_bit_for_bit() -> None:
    averaged, offset_N = server(), updates(1, seed=1)[0]
    for mean_N in updates(T):
        averaged.step(mean_N.clone())
        offset_N = offset_N + mean_N
    assert torch.equal(averaged.offset_N, offset_N)


def momentum(x_N: Tensor, delta_TN: Tensor) -> Tensor:
    """FedAvgM: m = b m + d; x = x + lr m."""
    m_N = torch.zeros(N).double()
    for delta_N in delta_TN:
        m_N = B1 * m_N + delta_N
        x_N = x_N + LR * m_N
    return x_N


def adam(x_N: Tensor, delta_TN: Tensor) -> Tensor:
    """FedAdam: m = b1 m + (1 - b1) d, v = b2 v + (1 - b2) d^2, from tau^2; x = x + lr m / (sqrt(v) + tau)."""
    m_N, v_N = torch.zeros(N).double(), torch.full((N,), TAU**2).double()
    for delta_N in delta_TN:
        m_N, v_N = B1 * m_N + (1 - B1) * delta_N, B2 * v_N + (1 - B2) * delta_N**2
        x_N = x_N + LR * m_N / (v_N.sqrt() + TAU)
    return x_N


def yogi(x_N: Tensor, delta_TN: Tensor) -> Tensor:
    """FedYogi: m as in Adam; v = v - (1 - b2) d^2 sign(v - d^2), from tau^2; x = x + lr m / (sqrt(v) + tau)."""
    m_N, v_N = torch.zeros(N).double(), torch.full((N,), TAU**2).double()
    for delta_N in delta_TN:
        m_N = B1 * m_N + (1 - B1) * delta_N
        v_N = v_N - (1 - B2) * delta_N**2 * torch.sign(v_N - delta_N**2)
        x_N = x_N + LR * m_N / (v_N.sqrt() + TAU)
    return x_N


SETTINGS = {
    "sgd": {"optimizer": "sgd", "lr": LR, "momentum": B1},
    "adam": {"optimizer": "adam", "lr": LR, "momentum": B1, "beta2": B2, "eps": TAU},
    "yogi": {"optimizer": "yogi", "lr": LR, "momentum": B1, "beta2": B2, "eps": TAU},
}


@pytest.mark.parametrize(("name", "formula"), [("sgd", momentum), ("adam", adam), ("yogi", yogi)])
def test_optimizers_are_the_papers_formulas(name: str, formula: Any) -> None:
    moved = server(**SETTINGS[name])
    for mean_N in updates(T):
        moved.step(mean_N.clone())
    torch.testing.assert_close(moved.offset_N.double(), formula(updates(1, seed=1)[0].double(), updates(T).double()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, *SETTINGS.values()], ids=["average", *SETTINGS])
def test_a_restored_server_goes_on_with_the_same_bits(settings: dict[str, Any]) -> None:
    through = server(**settings)
    for mean_N in updates(T):
        through.step(mean_N.clone())
    stopped = server(**settings)
    for mean_N in updates(T)[:3]:
        stopped.step(mean_N.clone())
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    resumed = Server(ServerConfig(**settings), torch.zeros(N))
    resumed.restore(state)
    for mean_N in updates(T)[3:]:
        resumed.step(mean_N.clone())
    assert torch.equal(resumed.offset_N, through.offset_N)
