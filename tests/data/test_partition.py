from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_dist.config import DataConfig
from slora_dist.data.partition import split
from slora_dist.data.source import Documents
from slora_dist.errors import ConfigError

CLASSES = 5


def documents(total: int = 300, clients: list[str] | None = None) -> Documents:
    return Documents([f"text {at}" for at in range(total)], [at % CLASSES for at in range(total)], clients)


def config(partition: str, **settings: Any) -> DataConfig:
    return DataConfig(path="toy", partition=partition, client_column="client", **settings)  # type: ignore[arg-type]


def natural() -> Documents:
    sizes = {"ann": 40, "bob": 80, "cid": 40, "dan": 10, "eve": 130}
    return documents(300, [name for name, size in sizes.items() for _ in range(size)])


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "quantity", "natural"])
def test_parts_are_disjoint_ascending_and_repeatable(partition: str) -> None:
    parts = split(natural(), config(partition), 4, seed=3)
    joined = np.concatenate(parts)
    assert len(parts) == 4 and len(set(joined.tolist())) == len(joined)
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    again = split(natural(), config(partition), 4, seed=3)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "quantity"])
def test_the_seed_matters(partition: str) -> None:
    one, two = (split(documents(), config(partition), 4, seed) for seed in (0, 1))
    assert [part.tolist() for part in one] != [part.tolist() for part in two]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "quantity", "pathological"])
@pytest.mark.parametrize("shards", [1, 2, 6])
def test_all_documents_are_given_out(partition: str, shards: int) -> None:
    assert sum(map(len, split(documents(), config(partition, shards=shards), 7, seed=0))) == 300


def test_iid_is_even_and_mixed() -> None:
    parts = split(documents(), config("iid"), 7, seed=0)
    assert {len(part) for part in parts} <= {42, 43}
    assert all({at % CLASSES for at in part.tolist()} == set(range(CLASSES)) for part in parts)


def test_small_alpha_is_more_heterogeneous() -> None:
    def spread(alpha: float) -> float:
        return float(np.std([len(part) for part in split(documents(), config("dirichlet", alpha=alpha), 4, seed=1)]))

    assert spread(0.1) > 3 * spread(1000.0)


def test_quantity_skews_the_sizes_and_not_the_labels() -> None:
    even, skewed = (split(documents(3000), config("quantity", alpha=alpha), 10, seed=1) for alpha in (1e4, 0.3))
    sizes = [sorted(map(len, parts)) for parts in (even, skewed)]
    assert sizes[0][0] > 250 and sizes[1][0] < 100 and sizes[1][-1] > 600
    largest = max(skewed, key=len)
    counts = np.bincount(largest % CLASSES, minlength=CLASSES)
    assert abs(counts / len(largest) - 1 / CLASSES).max() < 0.05


@pytest.mark.parametrize(("total", "count"), [(30, 30), (31, 30), (300, 100)])
def test_the_smallest_share_is_one_document(total: int, count: int) -> None:
    parts = split(documents(total), config("quantity", alpha=0.01), count, seed=0)
    assert min(map(len, parts)) == 1 and sum(map(len, parts)) == total


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "quantity"])
def test_one_client_holds_everything(partition: str) -> None:
    (part,) = split(documents(), config(partition), 1, seed=0)
    assert part.tolist() == list(range(300))


@pytest.mark.parametrize("shards", [1, 2])
def test_pathological_clients_hold_the_classes_of_their_shards(shards: int) -> None:
    parts = split(documents(), config("pathological", shards=shards), 30, seed=0)  # 300 documents, 60 a class: a shard has one class
    assert all(len({at % CLASSES for at in part.tolist()}) <= shards for part in parts)
    assert {len(part) for part in parts} == {10} and sum(map(len, parts)) == 300


def test_natural_takes_the_largest_and_breaks_ties_by_name() -> None:
    source = natural()
    assert source.clients is not None
    parts = split(source, config("natural"), 3, seed=0)
    owners = [{source.clients[at] for at in part.tolist()} for part in parts]
    assert owners == [{"eve"}, {"bob"}, {"ann"}]
    assert [len(part) for part in parts] == [130, 80, 40]


@pytest.mark.parametrize(
    ("partition", "settings", "source", "count", "message"),
    [
        ("iid", {}, documents(3), 4, "clients.count: 4 clients for 3 documents"),
        ("natural", {}, natural(), 6, "clients.count: 6 clients, but the documents name 5"),
        ("pathological", {"shards": 6}, documents(20), 4, "data.shards: 4 clients x 6 shards for 20 documents"),
        ("dirichlet", {"alpha": 1e-3}, documents(30), 30, "data.partition: the documents do not suffice"),
    ],
)
def test_errors_name_the_setting(partition: str, settings: dict[str, Any], source: Documents, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(source, config(partition, **settings), count, seed=0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    split(natural(), config("natural"), 3, seed=0)
    split(documents(40), config("dirichlet", alpha=0.1), 6, seed=0)  # needs a second attempt, of which flwr warns
    assert capfd.readouterr() == ("", "") and not recwarn.list


@settings(max_examples=40, deadline=None)
@given(
    partition=st.sampled_from(["iid", "dirichlet", "quantity", "pathological"]),
    total=st.integers(1, 200),
    count=st.integers(1, 12),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 2**31),
)
def test_any_split_gives_documents_to_one_client_or_says_why_not(partition: str, total: int, count: int, alpha: float, seed: int) -> None:
    try:
        parts = split(documents(total), config(partition, alpha=alpha), count, seed)
    except ConfigError:
        return
    joined = np.concatenate(parts)
    assert len(parts) == count and min(map(len, parts)) >= 1
    assert len(set(joined.tolist())) == len(joined) and joined.min() >= 0 and joined.max() < total
    assert len(joined) == total
