"""How one source falls to clients: at random, in drawn sizes, or by a partitioner of flwr-datasets.

Every rank computes the same split; nothing is sent. Legend: K clients.
"""

import contextlib
import io
import warnings
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slora_dist.config import DataConfig
from slora_dist.data.permutation import permutation
from slora_dist.data.source import Documents
from slora_dist.errors import ConfigError
from slora_dist.seeding import derive

REMEDY = "fewer clients, a larger alpha, more documents"


def split(documents: Documents, config: DataConfig, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Return for each of ``count`` clients the ascending indices of its documents; none belongs to two clients.

    ``natural`` takes the ``count`` client ids with the most documents. Raises ``ConfigError`` if the documents do not suffice.
    """
    total = len(documents.texts)
    if count > total:
        raise ConfigError("clients.count", f"{count} clients for {total} documents", f"1 to {total}")
    parts = _natural(documents, count) if config.partition == "natural" else _drawn(documents, config, count, derive(seed, "partition"))
    for client, part in enumerate(parts):
        if len(part) == 0:
            raise ConfigError("data.partition", f"client {client} gets no documents", REMEDY)
    return parts


def held_out(count: int, share: float) -> int:
    """Return how many of its ``count`` documents a client holds out: one or more, unless the last one would go."""
    return min(count - 1, max(1, round(share * count))) if share and count else 0


def hold_out(count: int, share: float, seed: int, client: int) -> tuple[list[int], list[int]]:
    """Return which of its ``count`` documents a client trains on, and which it holds out, drawn from ``seed``; both ascending."""
    drawn = permutation(count, derive(seed, "holdout", client)).tolist()
    held = held_out(count, share)
    return sorted(drawn[held:]), sorted(drawn[:held])


def _natural(documents: Documents, count: int) -> list[NDArray[np.int64]]:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    assert documents.clients is not None, "source.load_train reads the column that config demands"
    sizes = Counter(documents.clients)
    if count > len(sizes):
        raise ConfigError("clients.count", f"{count} clients, but the documents name {len(sizes)}", f"1 to {len(sizes)}")
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:count]
    place = {name: at for at, name in enumerate(sorted(sizes))}  # the partitioner numbers ids in sorted order
    return _indices(NaturalIdPartitioner("key"), documents.clients, [place[name] for name in largest])


def _drawn(documents: Documents, config: DataConfig, count: int, seed: int) -> list[NDArray[np.int64]]:
    if config.partition == "iid":  # one line; the library's import would cost every rank a second and 150 MB
        return [np.sort(part) for part in np.array_split(permutation(len(documents.texts), seed), count)]
    if config.partition == "quantity":
        return _sized(len(documents.texts), config.alpha, count, seed)
    if config.partition == "pathological":
        return _sharded(documents.labels, config.shards, count, seed)
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(count, "key", config.alpha, min_partition_size=1, self_balancing=False, seed=seed)
    return _indices(partitioner, documents.labels, range(count))


def _sharded(labels: list[int], shards: int, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Cut the documents, sorted by label, into pieces whose sizes differ by one at most, and deal as many at random to each client."""
    if count * shards > len(labels):
        raise ConfigError("data.shards", f"{count} clients x {shards} shards for {len(labels)} documents", f"1 to {len(labels) // count}")
    pieces = np.array_split(np.argsort(labels, kind="stable"), count * shards)
    dealt = permutation(count * shards, seed).reshape(count, shards)
    return [np.sort(np.concatenate([pieces[at] for at in row])) for row in dealt]


def _sized(total: int, alpha: float, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Split at random into sizes of drawn shares: each client has one document, and of the rest its share by Dirichlet(alpha)."""
    share_K = np.random.Generator(np.random.Philox(key=derive(seed, "sizes"))).dirichlet(np.full(count, alpha))
    end_K = np.rint(np.cumsum(share_K) * (total - count)).astype(np.int64) + np.arange(1, count + 1)
    return [np.sort(part) for part in np.split(permutation(total, seed), end_K[:-1])]


def _indices(partitioner: Any, keys: list[int] | list[str], parts: Any) -> list[NDArray[np.int64]]:
    """Let ``partitioner`` split by ``keys`` alone (texts stay here) and read back which row went where."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"key": keys, "index": range(len(keys))})
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it warns of every retry and shows a progress bar
            warnings.simplefilter("ignore")
            return [np.sort(np.asarray(partitioner.load_partition(part)["index"][:], dtype=np.int64)) for part in parts]
    except ValueError as error:
        raise ConfigError("data.partition", f"the documents do not suffice: {str(error).split('. ')[0].rstrip('.')}", REMEDY) from None
