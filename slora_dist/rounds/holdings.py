"""What a rank has loaded, as digests: so much must be alike on two ranks, or they do not mean the same run.

Ranks that are there from the start find out by the fingerprints of their first phase. One that joins a run under way is asked before it is
taken in, so that the run goes on without it.
"""

import hashlib
import json
from collections.abc import Sequence

import torch

from slora_dist.data.federation import Federation
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel
from slora_dist.support import Support

PARTS = {  # what may differ, most telling first: the setting that names it, and what would be right
    "documents": ("data.path", "the same documents on every rank"),
    "words": ("model.tokenizer", "the same tokenizer on every rank"),
    "weights": ("model.name", "the same files of the model, and the same versions of torch and transformers, on every rank"),
    "coordinates": ("method", "the same versions of torch and numpy on every rank"),
}


def holdings(classifier: TaskModel, federation: Federation, supports: Sequence[Support]) -> bytes:
    """Return the digests of this rank's model, before any phase, of its documents and of the coordinates of all phases, as JSON."""
    words = json.dumps(sorted(federation.tokenizer.get_vocab().items())).encode()
    digests = {"documents": federation.digest(), "words": hashlib.sha256(words).hexdigest(), "weights": _weights(classifier)}
    return json.dumps(digests | {"coordinates": _coordinates(supports)}).encode()


def compare(own: bytes, rank: int, theirs: bytes) -> ConfigError | None:
    """Return why rank 0 refuses a rank that has loaded ``theirs`` where it has its ``own``, or None."""
    try:
        told = json.loads(theirs)
        differing = [part for part, digest in json.loads(own).items() if told.get(part) != digest]
    except (ValueError, AttributeError, RecursionError):  # brackets without end
        return ConfigError("--join", f"rank {rank} tells of what it has loaded what cannot be read", "the same version on every rank")
    if not differing:
        return None
    setting, allowed = PARTS[differing[0]]
    return ConfigError(setting, f"rank {rank} has loaded other {' and '.join(differing)} than rank 0", allowed)


def _weights(classifier: TaskModel) -> str:
    whole = hashlib.sha256()
    for name, tensor in classifier.net.state_dict().items():
        whole.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        whole.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _coordinates(supports: Sequence[Support]) -> str:
    """Return a digest of all slots; what a seed draws is the same wherever the seed is."""
    whole = hashlib.sha256()
    for slot in (slot for support in supports for slot in support.slots):
        whole.update(repr(slot).encode())
        if slot.chosen is not None:
            whole.update(slot.chosen.numpy().data)
    return whole.hexdigest()
