"""Seconds on links: closed forms, and what fairness must mean."""

from itertools import pairwise
from math import inf, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slora_dist.links import FRAMING, KERNEL, Collective, Direct, Link, fair, passed_on, play, read_in_order, receives, seconds

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


def through(size: int, kernel: float) -> list[float]:
    return [one.through for one in passed_on(size, 1.0, kernel, [0.0] * size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 64])
def test_a_tree_reaches_everybody_in_a_logarithm_of_steps(size: int) -> None:
    turns = through(size, 0.0)
    assert len(turns) == size and (size == 1 or min(turns) >= 1)
    assert turns[0] == (size - 1).bit_length(), "rank 0 sends a copy to each of its children at once"
    assert max(turns) <= max(1, log2(max(size, 2)) * (log2(max(size, 2)) + 1))
    assert size < 8 or max(turns) < size - 1, "better than a copy for each"


def test_long_messages_leave_side_by_side() -> None:
    """Measured on four hosts behind 100 Mbit/s: 3.1 message times for 16 MB, headers included. Rank 1 passes it on to rank 3."""
    assert through(4, 0.0) == [2, 3, 2, 3] and through(8, 0.0) == [3, 5, 4, 6, 3, 5, 4, 6]


def test_short_messages_leave_one_after_the_other_while_their_sender_goes_on() -> None:
    ranks = passed_on(4, 1.0, 1.0, [0.0, 0.25, 0.0, 0.5])
    assert [one.has for one in ranks] == [0, 1.25, 2, 2.75]
    assert [one.through for one in ranks] == [one.has for one in ranks], "nobody waits for those to whom it passes on"
    assert [one.free for one in ranks] == [2, 2.25, 2, 2.75]


@given(st.integers(1, 40), st.floats(0, 1))
def test_a_sender_goes_on_when_the_kernel_holds_the_rest(size: int, kernel: float) -> None:
    for one in passed_on(size, 1.0, kernel, [0.0] * size):
        copies = one.free - one.has
        assert one.through == pytest.approx(one.has + copies * (1 - kernel))


def test_rank_0_reads_in_order_and_one_message_may_overtake() -> None:
    assert read_in_order([5.0, 0.0, 0.0], [[1.0]] * 3, 0.0) == [6, 6, 7], "the second waits in rank 0, the third at its sender"
    assert read_in_order([0.0, 0.0, 9.0], [[1.0]] * 3, 2.0) == [3, 4, 10], "nothing is read before rank 0 asks"
    assert read_in_order([5.0, 0.0], [[1.0, 1.0]] * 2, 0.0) == [7, 9], "not even one while the first still takes two receives"


@given(st.lists(st.tuples(st.floats(0, 10), st.lists(st.floats(0.01, 3), min_size=1, max_size=3)), min_size=1, max_size=6))
def test_a_reading_link_carries_one_thing_at_a_time(messages: list[tuple[float, list[float]]]) -> None:
    ready, parts = (list(column) for column in zip(*messages, strict=True))
    ends = read_in_order(ready, parts, 0.0)
    spent = [sum(own) for own in parts]
    assert all(later >= earlier for earlier, later in pairwise(ends))
    assert all(end >= start + own - 1e-9 for start, own, end in zip(ready, spent, ends, strict=True))
    assert sum(spent) - 1e-9 <= ends[-1] <= max(ready) + sum(spent) + 1e-9


def test_a_message_takes_a_receive_a_bucket() -> None:
    assert receives(10, 4) == [4, 4, 2] and receives(0, 4) == [0]


def test_a_round_is_download_training_upload() -> None:
    (only,) = play(Direct(inf), [Link(8.0, 16.0, 0.1)], (MEGABYTE, MEGABYTE), [3.0])
    ends = (only.downloaded, only.trained, only.uploaded)
    assert ends == pytest.approx((ONE / 2 + 0.1, ONE / 2 + 3.1, ONE * 1.5 + 3.2))


def test_ranks_behind_alike_links_queue_at_rank_0() -> None:
    rounds = play(Collective(inf, MEGABYTE, kernel=0), [Link(8.0, 8.0)] * 3, (MEGABYTE, MEGABYTE), [1.0] * 3)
    assert [one.downloaded for one in rounds] == pytest.approx([3 * ONE, 2 * ONE, 3 * ONE])
    assert [one.uploaded for one in rounds] == pytest.approx([4 * ONE + 1, 4 * ONE + 1, 5 * ONE + 1]), "rank 2 was ready first"


def test_what_is_agreed_on_before_an_upload_waits_for_the_last_and_goes_there_and_back() -> None:
    links, sizes = [Link(8.0, 16.0, 0.1), Link(8.0, 16.0, 0.2)], (MEGABYTE, MEGABYTE)
    plain, agreed = (play(Direct(inf), links, sizes, [3.0, 5.0], exchanges) for exchanges in ([], [(0, 0), (0, MEGABYTE)]))
    trained = max(one.trained for one in plain)
    assert [one.trained for one in agreed] == [one.trained for one in plain]
    told = trained + 0.2 + 0.2 + 0.2  # both have the first answer when the second link has carried it, and ask again
    assert [one.uploaded for one in agreed] == pytest.approx([told + ONE / 2 + 0.2 + ONE, told + ONE / 2 + 0.4 + ONE])


MEASURED = {  # Mbit/s: {kB: seconds of a broadcast, 0.05 s of training and a gather}, 4 ranks on shaped hosts, means of two
    10: {250: 1.039, 500: 2.026, 1000: 4.124, 1500: 6.265, 2500: 10.437, 5000: 24.687},
    100: {250: 0.142, 500: 0.236, 1000: 0.440, 1500: 0.673, 2500: 1.095, 5000: 2.444},
}


@pytest.mark.parametrize(("mbit", "size"), [(mbit, size) for mbit, sizes in MEASURED.items() for size in sizes])
def test_rounds_on_really_shaped_links_are_foretold(mbit: int, size: int) -> None:
    """Messages below, around and above what a kernel takes, and above what rank 0 receives at a time."""
    rounds = play(Collective(mbit, 4 << 20, KERNEL), [Link(mbit, mbit)] * 3, (size * 1000, size * 1000), [0.05] * 3)
    assert max(one.uploaded for one in rounds) == pytest.approx(MEASURED[mbit][size], rel=0.08)
