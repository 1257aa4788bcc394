"""How the documents of a run fall to its clients, without a model and without tokens.

Legend: K clients, C classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slora_dist.config import Config
from slora_dist.data import source
from slora_dist.data.federation import class_names
from slora_dist.data.instructions import unread
from slora_dist.data.partition import split


@dataclass(frozen=True)
class Overview:
    """The documents of every client by class, ``counts_KC``, and the names of the classes."""

    names: list[str]
    counts_KC: NDArray[np.int64]

    def figures(self) -> dict[str, Any]:
        """Return sizes, labels a client, and two figures of skew, 0 where all clients are alike.

        ``label_skew`` is the total variation distance (half of sum |p_k - p|, at most 1) of a client's labels to those of all documents,
        in the mean over documents. ``size_skew`` is the coefficient of variation of the clients' sizes.
        """
        size_K, total = self.counts_KC.sum(1), self.counts_KC.sum()
        distance_K = np.abs(self.counts_KC / size_K[:, None] - self.counts_KC.sum(0) / total).sum(1) / 2
        return {
            "clients": len(size_K),
            "labels": len(self.names),
            "documents": {"total": int(total)} | _spread(size_K),
            "labels_per_client": _spread((self.counts_KC > 0).sum(1)),
            "label_skew": float((distance_K * size_K).sum() / total),
            "size_skew": float(size_K.std() / size_K.mean()),
        }

    def table(self) -> dict[str, Any]:
        """Return ``{"counts": {class: documents of each client}}``."""
        return {"counts": {name: self.counts_KC[:, at].tolist() for at, name in enumerate(self.names)}}


def overview(config: Config) -> Overview:
    """Return the split of a run; every client's own file is read where each has one. Raises ``ConfigError``."""
    names, labels = _labels(config)
    return Overview(names, np.array([np.bincount(own, minlength=len(names)) for own in labels], dtype=np.int64))


def _labels(config: Config) -> tuple[list[str], list[list[int]]]:
    """Return the names of the classes, and the label of every document of every client."""
    read = unread if config.model.task == "causal_lm" else None
    if config.client_files:
        names = class_names(config)
        return names, [source.load_client(config.data, client, names, read).labels for client in range(config.clients.count)]
    documents, names = source.load_train(config.data, config.run.seed, read)
    parts = split(documents, config.data, config.clients.count, config.run.seed)
    return names, [[documents.labels[at] for at in part] for part in parts]


def _spread(values_K: NDArray[np.int64]) -> dict[str, Any]:
    return {"min": int(values_K.min()), "median": float(np.median(values_K)), "max": int(values_K.max())}
