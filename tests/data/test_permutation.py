from hypothesis import given
from hypothesis import strategies as st

from slora_dist.data.permutation import permutation, subset


def test_bits_are_fixed() -> None:
    """The stream is part of what fixes a run: a change of these numbers changes every result."""
    assert permutation(8, 7).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]


@given(st.integers(0, 60), st.integers(0, 2**63 - 1))
def test_holds_every_index_once(count: int, seed: int) -> None:
    assert sorted(permutation(count, seed).tolist()) == list(range(count))


@given(st.integers(0, 60), st.integers(1, 80), st.integers(0, 2**63 - 1))
def test_subset_is_ascending_and_within_the_limit(count: int, limit: int, seed: int) -> None:
    kept = subset(count, limit, seed).tolist()
    assert len(kept) == min(count, limit)
    assert kept == sorted(set(kept)) and all(0 <= index < count for index in kept)


def test_seeds_differ() -> None:
    assert permutation(50, 1).tolist() != permutation(50, 2).tolist()
    assert subset(50, 10, 1).tolist() != subset(50, 10, 2).tolist()
