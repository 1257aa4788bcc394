"""Masks: exact, repeatable, uniform."""

import hashlib

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from slora_dist import methods
from slora_dist.config import MethodConfig, SparsePhase
from slora_dist.masks import Pattern, grid, kept, largest, random_mask
from tests.families import build


@pytest.mark.parametrize(("numel", "count"), [(10, 0), (10, 1), (10, 10), (1000, 100), (65537, 6554)])
def test_exactly_count_distinct_positions_in_order(numel: int, count: int) -> None:
    mask = random_mask(numel, count, 3)
    assert mask.dtype == torch.int64 and mask.shape == (count,)
    assert bool((mask[1:] > mask[:-1]).all())
    assert count == 0 or (int(mask[0]) >= 0 and int(mask[-1]) < numel)


def test_the_share_is_rounded() -> None:
    assert [kept(numel, 0.1) for numel in (4, 5, 6, 16, 100)] == [0, 0, 1, 2, 10]


def test_the_bits_are_pinned() -> None:
    """Masks never travel: another version of this program must draw the same ones."""
    digest = hashlib.sha256(random_mask(100_000, 10_000, (1 << 63) - 25).numpy().tobytes()).hexdigest()
    assert digest == "ebc69202a606c72b18203f4a97edb411c86dbc4a58c800faa791292ceed3a348"


def test_every_position_is_equally_likely() -> None:
    """Chi-square over positions, many seeds; and over cells of one large mask."""
    seen = torch.zeros(64)
    for seed in range(4000):
        seen[random_mask(64, 16, seed * 0x51ED270B)] += 1
    assert scipy.stats.chisquare(seen.numpy()).pvalue > 1e-3
    cells = torch.bincount(random_mask(1 << 20, 1 << 16, 7) >> 12, minlength=256)
    assert scipy.stats.chisquare(cells.numpy()).pvalue > 1e-3


def test_seeds_differ() -> None:
    """Two masks of density d share d of their entries, no more: neighbouring seeds are as good as distant ones."""
    one, other = (set(random_mask(100_000, 10_000, seed).tolist()) for seed in (1, 2))
    assert abs(len(one & other) - 1000) < 150


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(384, 1536), (1536, 384), (30522, 384), (7, 300)])
def test_structure_keeps_the_density(shape: tuple[int, int], density: float) -> None:
    """To within one row or column of the smaller choice."""
    for pattern in ("rows", "columns", "product"):
        rows, columns = grid(shape, density, pattern)
        assert 1 <= rows <= shape[0] and 1 <= columns <= shape[1]
        assert abs(rows * columns - density * shape[0] * shape[1]) <= max(rows, columns)
    rows, columns = grid(shape, density, "product")
    assert shape[0] < 100 or rows / shape[0] == pytest.approx(columns / shape[1], rel=0.1)


def test_what_has_no_structure() -> None:
    assert grid((40,), 0.1, "product") is None and grid((40, 30), 0.1, "random") is None


def test_the_largest_are_kept_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [3.0, 0.0, 2.0]])
    kept = [[], [1], [1, 3], [1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert [largest(scores, count).tolist() for count in range(7)] == kept


def test_a_mask_by_magnitude_keeps_the_largest_weights() -> None:
    """Derived from the pretrained weights, on any rank, whatever the seed."""
    classifier, phase = build("bert"), SparsePhase(density=0.1, mask="magnitude")
    one, same = (methods.support(phase, classifier, MethodConfig(), seed) for seed in (0, 1))
    for slot, other in zip(one.slots, same.slots, strict=True):
        weights = classifier.net.get_parameter(slot.name).detach().abs().flatten()
        if slot.kind == "head":
            continue
        assert slot.index is not None and other.index is not None and torch.equal(slot.index, other.index)
        frozen = torch.ones(len(weights), dtype=torch.bool).index_fill(0, slot.index, False)
        assert slot.count == round(0.1 * len(weights)) and weights[slot.index].min() >= weights[frozen].max()
    assert one.fingerprint(one.reference(classifier.net)) == same.fingerprint(same.reference(classifier.net))


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_any_mask_has_its_count_of_ascending_positions(numel: int, density: float, seed: int) -> None:
    count = kept(numel, density)
    mask = random_mask(numel, count, seed)
    assert mask.shape == (count,) and abs(count - density * numel) <= 1
    assert not count or (int(mask[0]) >= 0 and int(mask[-1]) < numel and bool((mask.diff() > 0).all()))
    assert torch.equal(mask, random_mask(numel, count, seed))


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.floats(0.001, 1), st.sampled_from(["rows", "columns", "product"]))
def test_any_grid_lies_in_its_matrix_and_keeps_nearly_the_density(shape: tuple[int, int], density: float, pattern: Pattern) -> None:
    cells = grid(shape, density, pattern)
    assert cells is not None and all(1 <= cell <= side for cell, side in zip(cells, shape, strict=True))
    whole = {"rows": shape[1], "columns": shape[0], "product": max(shape)}[pattern]
    assert abs(cells[0] * cells[1] - density * shape[0] * shape[1]) <= whole
