"""``factor`` against torch.linalg.svd. Legend: O/I out/in features, R rank."""

import pytest
import torch
from torch import Tensor

from slora_dist import svd
from slora_dist.svd import factor

TALL, WIDE, SQUARE = (90, 40), (40, 90), (60, 60)
every_shape = pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
every_rank = pytest.mark.parametrize("rank", [1, 5, 30, 40])  # Lanczos at 1 and 5, the full SVD at 30 and 40


def random_matrix(shape: tuple[int, int], density: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)


def truncation(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(the best approximation of ``rank``, all singular values), float64."""
    u, s, vt = torch.linalg.svd(delta_OI.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank], s


@every_shape
@every_rank
@pytest.mark.parametrize("density", [1.0, 0.1, 0.03])  # 0.03 takes the sparse products
def test_equals_the_truncated_svd(shape: tuple[int, int], rank: int, density: float) -> None:
    delta_OI = random_matrix(shape, density)
    factors = factor(delta_OI, rank)
    best_OI, s = truncation(delta_OI, rank)
    product_OI = factors.b_OR.double() @ factors.a_RI.double()
    assert factors.b_OR.shape == (shape[0], rank) and factors.a_RI.shape == (rank, shape[1])
    torch.testing.assert_close(product_OI, best_OI, atol=2e-6, rtol=1e-5)
    tail = (delta_OI.double() - product_OI).square().sum()
    torch.testing.assert_close(tail, s[rank:].square().sum(), rtol=1e-5, atol=1e-9)  # Eckart-Young
    assert factors.energy == pytest.approx(float(s.square().sum()))
    assert factors.kept_energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()))


@every_shape
def test_full_rank_reconstructs(shape: tuple[int, int]) -> None:
    delta_OI = random_matrix(shape)
    factors = factor(delta_OI, min(shape))
    torch.testing.assert_close(factors.b_OR @ factors.a_RI, delta_OI, atol=1e-5, rtol=1e-5)
    assert factors.kept_energy == pytest.approx(1.0)


@every_rank
def test_a_holds_orthonormal_right_vectors_and_b_all_of_s(rank: int) -> None:
    """The paper's B0 = U S, A0 = V^T: it would not hold for the SVD of the transpose."""
    factors = factor(random_matrix(TALL), rank)
    torch.testing.assert_close(factors.a_RI @ factors.a_RI.T, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.b_OR.norm(dim=0), truncation(random_matrix(TALL), rank)[1][:rank].float())
    assert (factors.a_RI.gather(1, factors.a_RI.abs().argmax(1, keepdim=True)) > 0).all(), "the sign of each pair is fixed"


@every_rank
def test_sqrt_gives_each_side_the_roots(rank: int) -> None:
    delta_OI = random_matrix(WIDE)
    us, sqrt = factor(delta_OI, rank), factor(delta_OI, rank, split="sqrt")
    torch.testing.assert_close(sqrt.b_OR @ sqrt.a_RI, us.b_OR @ us.a_RI, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(sqrt.b_OR.norm(dim=0), sqrt.a_RI.norm(dim=1))


@pytest.mark.parametrize("split", ["us", "sqrt"])
@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_scaled_as_peft_scales_it_equals_the_truncation(split: str, alpha: float) -> None:
    peft = pytest.importorskip("peft")
    delta_OI, rank = random_matrix(TALL), 4
    net = torch.nn.Sequential(torch.nn.Linear(TALL[1], TALL[0], bias=False))
    base_OI = net[0].weight.detach().clone()
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"]))
    factors = factor(delta_OI, rank, alpha / rank, split)  # type: ignore[arg-type]
    layer = wrapped.base_model.model[0]
    layer.lora_A["default"].weight.data = factors.a_RI
    layer.lora_B["default"].weight.data = factors.b_OR
    merged_OI = wrapped.merge_and_unload()[0].weight.detach()
    torch.testing.assert_close((merged_OI - base_OI).double(), truncation(delta_OI, rank)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("delta_OI", [random_matrix(SQUARE, 0.1), torch.ones(SQUARE).tril(-58)], ids=["full", "deficient"])
@every_rank
def test_same_matrix_same_bits(delta_OI: Tensor, rank: int) -> None:
    """Also where ARPACK runs out of directions and draws new ones, as it does for a matrix of lower rank."""
    first, torch_state = factor(delta_OI, rank), torch.get_rng_state()
    torch.manual_seed(99)  # no random state around it has a say
    second = factor(delta_OI.clone(), rank)
    torch.set_rng_state(torch_state)
    assert torch.equal(first.b_OR, second.b_OR) and torch.equal(first.a_RI, second.a_RI)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_matrix_of_lower_rank_repeats_its_bits_too(shape: tuple[int, int]) -> None:
    """ARPACK then runs out of directions and draws new ones: from a generator of ours, or the bits would change."""
    delta_OI = torch.zeros(shape)
    delta_OI[3, 4], delta_OI[20, 30] = 1.5, -0.5
    first = factor(delta_OI, 5)
    assert all(
        torch.equal(first.a_RI, again.a_RI) and torch.equal(first.b_OR, again.b_OR) for again in (factor(delta_OI, 5) for _ in range(3))
    )
    torch.testing.assert_close(first.b_OR @ first.a_RI, delta_OI, atol=1e-6, rtol=0)


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 5 goes through Lanczos and rank 30 does not: the tests above see both."""
    calls: list[int] = []
    true_eigsh = svd.eigsh
    monkeypatch.setattr(svd, "eigsh", lambda gram, k, **options: calls.append(k) or true_eigsh(gram, k=k, **options))
    for rank in (5, 30):
        factor(random_matrix(SQUARE), rank)
    assert calls == [5]


@pytest.mark.parametrize("split", ["us", "sqrt"])
@pytest.mark.parametrize("rank", [2, 20])
def test_a_matrix_of_zeros_gives_factors_that_can_train(split: str, rank: int) -> None:
    factors = factor(torch.zeros(SQUARE), rank, split=split)  # type: ignore[arg-type]
    assert not factors.b_OR.any() and factors.kept_energy == 1.0 and factors.energy == 0.0
    torch.testing.assert_close(factors.a_RI @ factors.a_RI.T, torch.eye(rank), atol=1e-6, rtol=0)


@pytest.mark.parametrize("split", ["us", "sqrt"])
@pytest.mark.parametrize("rank", [4, 20])
def test_directions_that_a_matrix_has_not_can_train_all_the_same(split: str, rank: int) -> None:
    """Two rows are all that a mask has kept: of the other pairs B is zero, A is not, so that B has a gradient."""
    delta_OI = torch.zeros(SQUARE)
    delta_OI[3], delta_OI[40] = random_matrix(SQUARE)[:2]
    factors = factor(delta_OI, rank, split=split)  # type: ignore[arg-type]
    torch.testing.assert_close(factors.a_RI[2:] @ factors.a_RI[2:].T, torch.eye(rank - 2), atol=1e-5, rtol=0)
    assert float(factors.b_OR[:, 2:].abs().max()) < 1e-5
    torch.testing.assert_close(factors.b_OR @ factors.a_RI, delta_OI, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [3, 20])
def test_a_matrix_of_lower_rank_than_asked_for(rank: int) -> None:
    delta_OI = torch.outer(torch.arange(60.0), torch.arange(50.0))
    factors = factor(delta_OI, rank)
    torch.testing.assert_close(factors.b_OR @ factors.a_RI, delta_OI, atol=1e-3, rtol=1e-5)
    assert factors.kept_energy == pytest.approx(1.0) and bool(factors.a_RI.isfinite().all())


def test_singular_values_that_are_all_alike() -> None:
    """Of an orthogonal matrix any five directions are the best, as long as they are orthogonal."""
    factors = factor(torch.linalg.qr(random_matrix(SQUARE)).Q, 5)
    torch.testing.assert_close(factors.a_RI @ factors.a_RI.T, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.b_OR.T @ factors.b_OR, torch.eye(5), atol=1e-5, rtol=0)
    assert factors.kept_energy == pytest.approx(5 / 60)


def test_what_cannot_be_factored_is_refused() -> None:
    for rank in (0, 41):
        with pytest.raises(ValueError, match=f"rank {rank} of a 40 x 90 matrix"):
            factor(torch.zeros(WIDE), rank)
    with pytest.raises(ValueError, match="not finite"):
        factor(torch.full(WIDE, float("nan")), 2)
