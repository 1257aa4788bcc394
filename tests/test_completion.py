"""``complete`` where the theory says what it must find. Legend: O/I out/in features, R rank, n observed entries."""

import pytest
import torch
from torch import Tensor

from slora_dist.completion import complete, truncate
from slora_dist.svd import Factors, factor

TALL, WIDE, LARGE = (90, 60), (60, 90), (300, 200)


def made(shape: tuple[int, int], rank: int, density: float, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(a matrix of low rank plus noise, the same with zeros where it is not observed, the flat positions of what is)."""
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    whole_OI = left @ right + noise * torch.randn(shape, generator=generator)
    observed_n = (torch.rand(whole_OI.numel(), generator=generator) < density).nonzero()[:, 0]
    zero_filled_OI = torch.zeros_like(whole_OI)
    zero_filled_OI.view(-1)[observed_n] = whole_OI.view(-1)[observed_n]
    return whole_OI, zero_filled_OI, observed_n


def product(found: Factors) -> Tensor:
    return found.b_OR @ found.a_RI


def error(found: Factors, whole_OI: Tensor, positions_n: Tensor | slice = slice(None)) -> float:
    """Relative error at flat positions."""
    truth = whole_OI.reshape(-1)[positions_n]
    return float((product(found).reshape(-1)[positions_n] - truth).norm() / truth.norm())


def cosine(found: Factors, whole_OI: Tensor) -> float:
    return float(torch.cosine_similarity(product(found).flatten(), whole_OI.flatten(), dim=0))


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("split", ["us", "sqrt"])
def test_a_matrix_of_low_rank_is_recovered_from_its_sample(shape: tuple[int, int], rank: int, scale: float, split: str) -> None:
    """Half of the entries, at least ten in a row and column for each degree of freedom."""
    whole_OI, zero_filled_OI, observed_n = made(shape, rank, 0.5)
    found = complete(zero_filled_OI, observed_n, rank, scale, split)  # type: ignore[arg-type]
    torch.testing.assert_close(scale * product(found), whole_OI, atol=1e-3, rtol=1e-3)
    assert found.observed_residual < 1e-6
    assert error(factor(zero_filled_OI, rank), whole_OI) > 0.4


@pytest.mark.parametrize(("noise", "density", "better"), [(0.0, 0.2, 0.5), (1.0, 0.2, 0.9), (1.0, 0.1, 1.0)])
def test_what_was_not_observed_is_foretold_better_than_by_the_svd(noise: float, density: float, better: float) -> None:
    """Rank 6 is asked for where 3 are behind the entries, as in a run, where nobody knows how many are."""
    whole_OI, zero_filled_OI, observed_n = made(LARGE, 3, density, noise)
    hidden = torch.ones(whole_OI.numel(), dtype=torch.bool)
    hidden[observed_n] = False
    completed, truncated = complete(zero_filled_OI, observed_n, 6), truncate(zero_filled_OI, observed_n, 6)
    hidden_n = hidden.nonzero()[:, 0]
    assert error(completed, whole_OI, hidden_n) < better * error(truncated, whole_OI, hidden_n)
    assert cosine(completed, whole_OI) > cosine(truncated, whole_OI)
    assert completed.observed_residual < truncated.observed_residual


def test_without_a_low_rank_behind_it_the_svd_is_all_there_is() -> None:
    """Noise foretells nothing, and completing it would only fit it."""
    _, zero_filled_OI, observed_n = made(LARGE, 1, 0.1, noise=100.0)
    completed, truncated = complete(zero_filled_OI, observed_n, 8), truncate(zero_filled_OI, observed_n, 8)
    assert torch.equal(completed.b_OR, truncated.b_OR) and torch.equal(completed.a_RI, truncated.a_RI)


@pytest.mark.parametrize("magnitude", ["step", "entries"])
@pytest.mark.parametrize("told", [True, False])
def test_a_full_mask_is_the_svd(magnitude: str, told: bool) -> None:
    whole_OI, _, _ = made(TALL, 5, 1.0, noise=0.5)
    completed = complete(whole_OI, torch.arange(whole_OI.numel()) if told else None, 3, magnitude=magnitude)  # type: ignore[arg-type]
    truncated = factor(whole_OI, 3)
    assert torch.equal(completed.b_OR, truncated.b_OR) and torch.equal(completed.a_RI, truncated.a_RI)
    assert completed.kept_energy == truncated.kept_energy
    assert completed.observed_residual == pytest.approx(truncated.observed_residual, rel=1e-4)


def test_a_step_is_the_completion_where_it_is_closest_to_the_update() -> None:
    _, zero_filled_OI, observed_n = made(LARGE, 3, 0.15, noise=0.3)
    entries, step = (complete(zero_filled_OI, observed_n, 4, magnitude=size) for size in ("entries", "step"))  # type: ignore[arg-type]
    ratio = float(product(step).norm() / product(entries).norm())
    assert 0.1 < ratio < 0.3, "about the density"
    torch.testing.assert_close(product(step), ratio * product(entries), atol=1e-5, rtol=1e-4)
    rest_OI = zero_filled_OI - product(step)
    assert abs(float((rest_OI * product(step)).sum())) < 1e-4 * float(zero_filled_OI.square().sum())
    left = float(rest_OI.square().sum() / zero_filled_OI.square().sum())
    assert step.kept_energy == pytest.approx(1 - left, rel=1e-4) == pytest.approx(entries.kept_energy, rel=1e-4)


@pytest.mark.parametrize("density", [0.02, 0.3])
def test_same_sample_same_bits(density: float) -> None:
    _, zero_filled_OI, observed_n = made(LARGE, 3, density, noise=0.1)
    first = complete(zero_filled_OI, observed_n, 5)
    torch.manual_seed(99)
    second = complete(zero_filled_OI.clone(), observed_n.flip(0), 5)  # nor does their order have a say
    assert torch.equal(first.b_OR, second.b_OR) and torch.equal(first.a_RI, second.a_RI)
    assert first.kept_energy == second.kept_energy and first.observed_residual == second.observed_residual


def test_an_observed_zero_is_an_observation() -> None:
    """Of a block matrix the zeros in the middle are no gaps: where they are told, they are believed."""
    whole_OI = torch.zeros(60, 60)
    whole_OI[:30, :30] = whole_OI[30:, 30:] = 1.0
    observed_n = (torch.rand(3600, generator=torch.Generator().manual_seed(1)) < 0.5).nonzero()[:, 0]
    zero_filled_OI = torch.zeros(60, 60)
    zero_filled_OI.view(-1)[observed_n] = whole_OI.view(-1)[observed_n]
    torch.testing.assert_close(product(complete(zero_filled_OI, observed_n, 2)), whole_OI, atol=1e-3, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_hardly_any_observation_gives_factors_that_can_train(count: int) -> None:
    zero_filled_OI, observed_n = torch.zeros(TALL), torch.arange(count) * 91
    zero_filled_OI.view(-1)[observed_n] = 1.0
    found = complete(zero_filled_OI, observed_n, 4)
    assert bool(product(found).isfinite().all()) and bool((found.a_RI.norm(dim=1) > 0.9).all())


def test_what_is_not_finite_is_refused() -> None:
    _, zero_filled_OI, observed_n = made(TALL, 2, 0.2)
    zero_filled_OI.view(-1)[observed_n[3]] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        complete(zero_filled_OI, observed_n, 2)
    with pytest.raises(ValueError, match="rank 61 of a 90 x 60 matrix"):
        complete(torch.zeros(TALL), observed_n, 61)
