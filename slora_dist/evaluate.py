"""How good a model is on held-out documents: always float32, so that a plain load of the adapter gives the same figures."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from slora_dist.data.tokens import Encoded, batches, by_length
from slora_dist.linear import fast

BATCH = 64  # documents in a step; it sets speed and memory only


@dataclass(frozen=True)
class Score:
    """Share of documents classified rightly, and the mean cross-entropy (nats a document)."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(net: nn.Module, documents: Encoded, pad: int) -> Score:
    """Return the score of ``net`` as it stands on ``documents``."""
    device = next(net.parameters()).device
    net.eval()
    right, total = 0, 0.0
    with fast(net):
        for batch in batches(documents, BATCH, pad, by_length(documents)):
            labels = batch.pop("labels").to(device)
            logits = net(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            right += int((logits.argmax(-1) == labels).sum())
            total += float(cross_entropy(logits, labels, reduction="sum"))
    return Score(right / len(documents), total / len(documents))
