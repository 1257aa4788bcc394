"""Waits that can be given up."""

import threading

import pytest

from slora_dist.comm.patience import Patience
from slora_dist.errors import TransportError


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, SystemExit])
def test_a_wait_returns_or_raises_what_it_raises(kind: type[BaseException]) -> None:
    patience, done = Patience(), []
    patience.wait(lambda: done.append(1))
    assert done == [1]

    def broken() -> None:
        raise kind("connection closed")

    with pytest.raises(kind, match="connection closed"):
        patience.wait(broken)
    patience.wait(lambda: done.append(2))
    assert done == [1, 2]
    patience.end()


def test_a_wait_without_end_can_be_given_up() -> None:
    patience, begun, forever = Patience(), threading.Event(), threading.Event()

    def stuck() -> None:
        begun.set()
        forever.wait()

    def give_up() -> None:
        begun.wait()
        patience.give_up()

    helper = threading.Thread(target=give_up)
    helper.start()
    with pytest.raises(TransportError, match="the group is over"):
        patience.wait(stuck)
    helper.join()
    forever.set()


def test_nothing_to_give_up() -> None:
    patience = Patience()
    patience.give_up()
    patience.wait(lambda: None)
    patience.end()
