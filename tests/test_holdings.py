"""What a rank that joins must have loaded, and how what differs is named."""

import json

import pytest
import torch

from slora_dist import methods, model
from slora_dist.config import Config
from slora_dist.data.federation import Federation
from slora_dist.errors import ConfigError
from slora_dist.model import TaskModel
from slora_dist.rounds.holdings import compare, holdings
from tests.tiny import tiny

MAGNITUDE = ("method.sparse.mask=magnitude", "data.limit=80")


def loaded(config: Config) -> tuple[TaskModel, Federation]:
    federation = Federation(config, model.tokenizer(config.model))
    return model.load(config.model, federation.names, config.run.seed), federation


def held(config: Config, classifier: TaskModel, federation: Federation) -> bytes:
    phases = config.method.resolved()
    return holdings(classifier, federation, [methods.support(phase, classifier, config.method, config.run.seed) for phase in phases])


def refusal(own: bytes, theirs: bytes) -> ConfigError:
    error = compare(own, 3, theirs)
    assert error
    return error


def test_ranks_that_have_loaded_the_same_find_nothing() -> None:
    config = tiny(*MAGNITUDE)
    own = held(config, *loaded(config))
    assert compare(own, 3, held(config, *loaded(config))) is None


def test_one_weight_of_another_snapshot_is_enough() -> None:
    """Even where nobody trains it: all have to hold the same model when the run ends."""
    config = tiny(*MAGNITUDE)
    classifier, federation = loaded(config)
    own = held(config, classifier, federation)
    with torch.no_grad():
        next(classifier.net.parameters()).view(-1)[0] += 2.0**-10
    error = refusal(own, held(config, classifier, federation))
    assert error.setting == "model.name" and error.problem == "rank 3 has loaded other weights than rank 0"


def test_weights_that_choose_other_coordinates_are_named_with_them() -> None:
    config = tiny(*MAGNITUDE)
    classifier, federation = loaded(config)
    own = held(config, classifier, federation)
    with torch.no_grad():
        for parameter in classifier.net.parameters():
            parameter.copy_(parameter.flip(0))
    assert "other weights and coordinates than" in str(refusal(own, held(config, classifier, federation)))


def test_other_documents_are_named() -> None:
    """Of the same number, which no header of a message would tell; without a tokenizer of the model's own the words follow from them."""
    config, other = tiny(*MAGNITUDE), tiny(*MAGNITUDE, "run.seed=1")
    classifier, federation = loaded(config)
    theirs = held(config, classifier, Federation(other, None))
    error = refusal(held(config, classifier, federation), theirs)
    assert error.setting == "data.path" and "other documents" in error.problem


@pytest.mark.parametrize("told", [b"", b"[]", b"null", b"\xff", b"{}", b"[" * 60_000, json.dumps({"weights": 1}).encode()])
def test_what_cannot_be_read_is_refused(told: bytes) -> None:
    config = tiny(*MAGNITUDE)
    assert compare(held(config, *loaded(config)), 3, told)
