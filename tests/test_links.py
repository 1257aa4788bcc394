"""Seconds on links: closed forms, and what fairness must mean."""

from math import inf, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_dist.links import FRAMING, Link, fair, play, play_collective, seconds, tree

MEGABYTE = 10**6
ONE = seconds(MEGABYTE, 8.0)  # a megabyte at a megabyte a second, with the headers of every frame


def test_a_message_takes_its_bits_and_headers() -> None:
    assert pytest.approx(FRAMING) == ONE
    assert seconds(MEGABYTE, inf) == 0


def test_alone_on_the_link_everybody_has_the_own_rate() -> None:
    assert fair([0.0, 5.0], [MEGABYTE] * 2, [8.0, 16.0], inf) == pytest.approx([ONE, 5 + ONE / 2])


def test_a_shared_link_is_shared_and_what_one_cannot_use_goes_to_the_others() -> None:
    assert fair([0.0] * 4, [MEGABYTE] * 4, [inf] * 4, 8.0) == pytest.approx([4 * ONE] * 4)
    slow, fast = fair([0.0, 0.0], [MEGABYTE] * 2, [2.0, inf], 8.0)
    assert (slow, fast) == pytest.approx((4 * ONE, ONE * 8 / 6))


def test_who_comes_later_takes_its_share_from_then_on() -> None:
    first, second = fair([0.0, ONE / 2], [MEGABYTE] * 2, [inf] * 2, 8.0)
    assert (first, second) == pytest.approx((1.5 * ONE, 2 * ONE))


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 10**7), st.floats(0.1, 100)), min_size=1, max_size=8),
    st.floats(0.5, 200) | st.just(inf),
)
def test_no_transfer_beats_its_own_cap_and_all_together_keep_to_the_shared_one(
    transfers: list[tuple[float, int, float]], capacity: float
) -> None:
    starts, sizes, caps = (list(column) for column in zip(*transfers, strict=True))
    ends = fair(starts, sizes, caps, capacity)
    for start, size, cap, end in zip(starts, sizes, caps, ends, strict=True):
        assert end >= start + seconds(size, min(cap, capacity)) * (1 - 1e-6) - 1e-9
    assert max(ends) >= min(starts) + seconds(sum(sizes), capacity) * (1 - 1e-6) - 1e-9
    assert max(ends) <= max(starts) + sum(seconds(size, min(cap, capacity)) for size, cap in zip(sizes, caps, strict=True)) + 1e-6


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 64])
def test_a_tree_reaches_everybody_in_a_logarithm_of_steps(size: int) -> None:
    turns = tree(size)
    assert len(turns) == size and (size == 1 or min(turns) >= 1)
    assert turns[0] == (size - 1).bit_length(), "rank 0 sends a copy to each of its children at once"
    assert max(turns) <= max(1, log2(max(size, 2)) * (log2(max(size, 2)) + 1))
    assert size < 8 or max(turns) < size - 1, "better than a copy for each"


def test_four_ranks_take_three_message_times() -> None:
    """Measured on four hosts behind 100 Mbit/s: 3.1 message times for 16 MB, headers included. Rank 1 passes it on to rank 3."""
    assert tree(4) == [2, 3, 2, 3] and tree(8) == [3, 5, 4, 6, 3, 5, 4, 6]


def test_a_round_is_download_training_upload() -> None:
    (only,) = play([Link(8.0, 16.0, 0.1)], inf, (MEGABYTE, MEGABYTE), [3.0])
    ends = (only.downloaded, only.trained, only.uploaded)
    assert ends == pytest.approx((ONE / 2 + 0.1, ONE / 2 + 3.1, ONE * 1.5 + 3.2))


def test_ranks_behind_alike_links_queue_at_rank_0() -> None:
    rounds = play_collective([Link(8.0, 8.0)] * 3, inf, (MEGABYTE, MEGABYTE), [1.0] * 3)
    assert [one.downloaded for one in rounds] == pytest.approx([3 * ONE, 2 * ONE, 3 * ONE])
    assert [one.uploaded for one in rounds] == pytest.approx([4 * ONE + 1, 5 * ONE + 1, 6 * ONE + 1])
