"""How good the model is on the clients' own held-out documents: when it is asked, what a client answers, and what a record says of it."""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slora_dist.config import Config
from slora_dist.errors import RunError
from slora_dist.evaluate import Tally, perplexity

KINDS = ("evaluation", "score")  # in the ledger, direction control: the offset that is judged, a client's answer
_ANSWER = struct.Struct("<qqd")  # predictions that were right, all of them, the sum of their losses
SCORE_BYTES = _ANSWER.size


def due(config: Config, number: int) -> bool:
    """Whether clients judge the model after round ``number``: every ``clients.eval_every`` rounds, and after the last one."""
    if not config.clients.holdout:
        return False
    every, last = config.clients.eval_every, sum(phase.rounds for phase in config.method.resolved())
    return number == last or bool(every and number % every == 0)


def pack(tally: Tally) -> bytes:
    """Return a client's answer, ``SCORE_BYTES`` long."""
    return _ANSWER.pack(tally.right, tally.count, tally.loss)


def unpack(answer: bytes) -> Tally:
    """Read a client's answer; raises ``RunError`` on one that no evaluation gives. A loss may be infinite or NaN, as the model is."""
    tally = Tally(*_ANSWER.unpack(answer))
    if not 0 <= tally.right <= tally.count or tally.loss < 0:
        raise RunError(f"a client's score that cannot be: {tally.right} of {tally.count} right, loss {tally.loss}")
    return tally


def figures(tallies: Sequence[Tally], task: str) -> dict[str, Any]:
    """Return what a record says of the clients that have held-out documents: every client counts alike, however many it has.

    It is ``count``, the number of these clients, and the mean, the worst and the worst but a tenth of their accuracies and losses; of
    causal language models also the perplexities of these losses. Without such a client there is the count alone.
    """
    scores = [tally.score for tally in tallies if tally.count]
    if not scores:
        return {"count": 0}
    accuracies, losses = np.array([score.accuracy for score in scores]), np.array([score.loss for score in scores])
    accuracy = _three(accuracies, {"mean": np.mean, "min": np.min, "p10": lambda values: np.percentile(values, 10)})
    loss = _three(losses, {"mean": np.mean, "max": np.max, "p90": lambda values: np.percentile(values, 90)})
    found: dict[str, Any] = {"count": len(scores), "accuracy": accuracy, "loss": loss}
    return found | ({"perplexity": {name: perplexity(value) for name, value in loss.items()}} if task == "causal_lm" else {})


def _three(values_K: Any, measures: dict[str, Callable[[Any], Any]]) -> dict[str, float]:
    return {name: float(measure(values_K)) for name, measure in measures.items()}
