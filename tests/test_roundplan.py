from collections import Counter

import pytest

from slora_dist.config import Config
from slora_dist.data.permutation import permutation
from slora_dist.errors import ConfigError
from slora_dist.roundplan import check_world, home, plan_round, workers
from tests.tiny import tiny


def config(count: int, per_round: int, seed: int = 0) -> Config:
    return tiny(f"clients.count={count}", f"clients.per_round={per_round}", f"run.seed={seed}")


def test_samples_k_of_n_without_replacement() -> None:
    settings = config(20, 7)
    for number in range(1, 50):
        clients = plan_round(settings, number, 1, [1] * 20).clients
        assert len(set(clients)) == 7 and list(clients) == sorted(clients) and set(clients) <= set(range(20))


def test_everybody_is_sampled_alike() -> None:
    """1,000 rounds of 5 of 20: each client 250 times with standard deviation 13.7; chi-square over 19 degrees, 43.8 is the 99.9 % point."""
    settings = config(20, 5)
    counts = Counter(client for number in range(1, 1001) for client in plan_round(settings, number, 1, [1] * 20).clients)
    assert len(counts) == 20 and sum((count - 250) ** 2 / (250 * 0.75) for count in counts.values()) * 19 / 20 < 43.8


def test_rounds_and_seeds_differ_but_repeat() -> None:
    plans = [plan_round(config(20, 5, seed), number, 1, [1] * 20) for seed in (0, 1) for number in (1, 2, 3)]
    assert len({plan.clients for plan in plans}) == 6
    assert plans[0] == plan_round(config(20, 5), 1, 1, [1] * 20)


@pytest.mark.parametrize("examples", [[3 * client + 1 for client in range(20)], None], ids=["shared source", "own files"])
def test_the_world_changes_who_plays_and_nothing_else(examples: list[int] | None) -> None:
    settings = config(20, 7)
    for number in range(1, 20):
        plans = {size: plan_round(settings, number, size, examples) for size in (1, 2, 4, 8)}
        for size, plan in plans.items():
            assert plan.clients == plans[1].clients
            assert sorted(client for rank in workers(size) for client in plan.played_by(rank)) == list(plan.clients)
            assert size == 1 or plan.played_by(0) == []


def test_one_client_per_rank_when_there_are_ranks_enough() -> None:
    assert plan_round(config(20, 7), 1, 8, [1000 if client == 3 else 1 for client in range(20)]).ranks == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("seed", range(5))
def test_load_is_balanced(seed: int) -> None:
    """The most loaded rank has at most 4/3 of the best possible, as largest-first promises (Graham 1969)."""
    examples = [int(size) ** 2 // 50 + 1 for size in permutation(40, seed)]
    plan = plan_round(config(40, 30, seed), 1, 5, examples)
    loads = [sum(examples[client] for client in plan.played_by(rank)) for rank in workers(5)]
    lower_bound = max(sum(loads) / 4, max(examples[client] for client in plan.clients))
    assert max(loads) <= 4 / 3 * lower_bound


def test_the_largest_client_is_placed_first() -> None:
    plan = plan_round(config(13, 13), 1, 3, [1] * 12 + [12])
    assert plan.played_by(1) == [12] and plan.played_by(2) == list(range(12))


def test_a_client_with_its_own_file_stays_at_home() -> None:
    settings = config(10, 6)
    assert [home(client, 4) for client in range(7)] == [1, 2, 3, 1, 2, 3, 1] and home(5, 1) == 0
    for number in range(1, 20):
        plan = plan_round(settings, number, 4, None)
        assert plan.ranks == tuple(home(client, 4) for client in plan.clients)


def test_more_workers_than_clients_are_refused() -> None:
    check_world(config(10, 3), 4)
    with pytest.raises(ConfigError, match=r"^clients.per_round: 3 clients cannot occupy 4 worker ranks\. Allowed: 1 to 4 ranks"):
        check_world(config(10, 3), 5)
    own = ("data.path=c{client}.csv", "data.labels=2", "data.test_path=t.csv", "data.partition=iid")
    own_files = tiny(*own, "clients.count=5", "clients.per_round=2")
    check_world(own_files, 6)
    with pytest.raises(ConfigError, match=r"^clients.count: 5 clients"):
        check_world(own_files, 7)


def test_sleeping_needs_a_rank_for_every_client() -> None:
    sleeping = tiny("network.mode=sleep", "clients.per_round=3")
    check_world(sleeping, 4)
    with pytest.raises(ConfigError, match=r"network\.mode: sleep with 3 clients on 2 worker"):
        check_world(sleeping, 3)
