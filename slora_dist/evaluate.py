"""How good a model is on held-out documents: always float32, so that a plain load of the adapter gives the same figures.

Legend: K documents of a batch, T tokens of the longest, V words of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slora_dist.data.tokens import IGNORED, Encoded, batches, by_length
from slora_dist.linear import fast

BATCH, ANSWERS = 64, 8  # documents in a step, without and with answers: these need a whole vocabulary of logits for every token


@dataclass(frozen=True)
class Score:
    """Share of documents classified rightly, and the mean cross-entropy (nats a document); of answers, both by token."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Tally:
    """Predictions on some documents: how many were right, of how many, and the sum of their cross-entropies."""

    right: int
    count: int
    loss: float

    @property
    def score(self) -> Score:
        """The score of one prediction or more."""
        return Score(self.right / self.count, self.loss / self.count)


def perplexity(loss: float) -> float:
    """Return exp(loss): among how many tokens a causal language model wavers in the mean; infinite where it overflows."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def figures(score: Score | None, task: str) -> dict[str, float | None]:
    """Return what a record says of a score: accuracy and loss, and of a causal language model the perplexity."""
    if score is None:
        scores: dict[str, float | None] = {"accuracy": None, "loss": None}
    else:
        scores = {"accuracy": score.accuracy, "loss": score.loss}
    return scores | ({"perplexity": None if score is None else perplexity(score.loss)} if task == "causal_lm" else {})


def evaluate(net: nn.Module, documents: Encoded, pad: int) -> Score:
    """Return the score of ``net`` as it stands on ``documents``, of which there is one at least."""
    return tally(net, documents, pad).score


@torch.no_grad()
def tally(net: nn.Module, documents: Encoded, pad: int) -> Tally:
    """Count what ``net`` as it stands predicts on ``documents``."""
    device = next(net.parameters()).device
    net.eval()
    right, total, count = 0, 0.0, 0
    with fast(net):
        for batch in batches(documents, ANSWERS if documents.answers else BATCH, pad, by_length(documents)):
            labels = batch.pop("labels").to(device)
            logits = net(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            if labels.dim() > 1:
                logits, labels = _answers(logits, labels)
            right += int((logits.argmax(-1) == labels).sum())
            total += float(cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    return Tally(right, count, total)


def _answers(logits_KTV: Tensor, labels_KT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits before each token that is learned, and the tokens."""
    learned_KT = labels_KT[:, 1:] != IGNORED
    return logits_KTV[:, :-1][learned_KT], labels_KT[:, 1:][learned_KT]
