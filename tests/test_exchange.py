"""Which messages a round has under each rule, and whom they concern."""

from collections import Counter
from typing import get_args

import pytest

from slora_dist.aggregate.factors import Pair
from slora_dist.config import LowrankPhase, Rule
from slora_dist.exchange import Exchange
from slora_dist.roundplan import sample
from slora_dist.support import Slot, Support
from tests.tiny import tiny

A, B, HEAD = 8 * 5, 9 * 5, 3
FIRST, ROUNDS = 3, 12
SUPPORT = Support(
    [Slot.whole("a", (5, 8), "factor_a"), Slot.whole("b", (9, 5), "factor_b"), Slot.whole("head", (3,), "head")]
)  # fmt: skip
RULES: tuple[Rule, ...] = get_args(Rule)


def exchange(rule: Rule, *overrides: str) -> Exchange:
    settings = tiny("clients.count=9", "clients.per_round=3", *overrides)
    return Exchange(settings, LowrankPhase(rounds=ROUNDS, rule=rule), FIRST, SUPPORT, [Pair("layer", slice(0, A), slice(A, A + B), 5, 1.0)])


def held(rule: Rule) -> dict[int, dict[str, int]]:
    """Play the broadcasts: by client the round of which it has each kind, after every round checked to be the newest."""
    messages, newest = exchange(rule), dict.fromkeys(("factor_a", "factor_b", "head"), FIRST)
    has: dict[int, dict[str, int]] = {}
    for number in messages.numbers():
        for message in messages.down(number):
            for client in message.clients:
                has.setdefault(client, {}).update({kind: newest[kind] for kind in message.part.support.counts()})
        for client in sample(tiny("clients.count=9", "clients.per_round=3"), number):
            assert has[client] == newest, (number, client)
        changed = newest if messages.behaviour.changes_all else messages.trains(number).support.counts()
        newest |= dict.fromkeys(changed, number + 1)
        if messages.behaviour.restarts:  # every client draws its factors
            has = {client: newest | {"head": has.get(client, {}).get("head", 0)} for client in range(9)}
    return has


@pytest.mark.parametrize("rule", RULES)
def test_every_client_has_all_that_changed_when_it_trains(rule: Rule) -> None:
    assert len(held(rule)) == 9


def sent(messages: Exchange, number: int) -> Counter[str]:
    """Numbers sent down in a round, to all clients together, by kind."""
    counts: Counter[str] = Counter()
    for message in messages.down(number):
        for kind, count in message.part.support.counts().items():
            counts[kind] += count * len(message.clients)
    return counts


def test_a_goes_to_each_client_once_under_ffa() -> None:
    messages = exchange("ffa")
    every = sum((sent(messages, number) for number in messages.numbers()), Counter())
    assert every["factor_a"] == 9 * A and every["factor_b"] == 3 * ROUNDS * B and every["head"] == 3 * ROUNDS * HEAD
    assert {messages.sends(number).support.numel for number in messages.numbers()} == {B + HEAD}


def test_rolora_sends_up_one_factor_and_down_what_is_lacking() -> None:
    every = exchange("rolora", "clients.per_round=9")
    assert [every.sends(number).support.numel for number in (3, 4, 5)] == [B + HEAD, A + HEAD, B + HEAD]
    assert sent(every, 3) == {"factor_a": 9 * A, "factor_b": 9 * B, "head": 9 * HEAD}
    assert sent(every, 4) == {"factor_b": 9 * B, "head": 9 * HEAD} and sent(every, 5) == {"factor_a": 9 * A, "head": 9 * HEAD}
    some = exchange("rolora")
    again = set(sample(tiny("clients.count=9", "clients.per_round=3"), 5)) & set(sample(tiny("clients.count=9", "clients.per_round=3"), 4))
    assert sent(some, 5)["factor_a"] == 3 * A and sent(some, 5)["factor_b"] == (3 - len(again)) * B


@pytest.mark.parametrize(("rule", "up"), [("fedavg", A + B + HEAD), ("svd", A + B + HEAD), ("fair", A + B + HEAD), ("fedsvd", B + HEAD)])
def test_other_rules_send_everything_down(rule: Rule, up: int) -> None:
    messages = exchange(rule)
    assert list(messages.faithful()) == [(4 * up, 4 * (A + B + HEAD))] * ROUNDS
    assert all(len(messages.down(number)) == 1 for number in messages.numbers())


def test_what_the_base_takes_over_goes_to_everybody() -> None:
    residual, products = exchange("fedex"), exchange("stack")
    for messages, clients in ((residual, 3 + 1), (products, 3)):  # the mean's own factors make one more
        (message,) = messages.folds(FIRST)
        assert message.wires.down.by_kind() == {"factor_a": 4 * clients * A, "factor_b": 4 * clients * B}
        assert message.clients == tuple(range(9))
    assert list(residual.faithful()) == [(4 * (A + B + HEAD), 4 * (A + B + HEAD) + 4 * 4 * (A + B))] * ROUNDS
    downs = [down for _, down in products.faithful()]
    assert downs == [4 * (A + B + HEAD) + 3 * 4 * (A + B)] + [4 * HEAD + 3 * 4 * (A + B)] * (ROUNDS - 1)
    assert sent(products, FIRST + 1) == {"head": 3 * HEAD}
