"""Causal language models: which weights move, what the loss is, and that a run of every kind of phase ends in what plain libraries load."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from slora_dist import methods, model
from slora_dist.audit.checks import audit
from slora_dist.cli import main
from slora_dist.config import DensePhase, LowrankPhase, MethodConfig, ModelConfig, SparsePhase
from slora_dist.data.federation import Federation
from slora_dist.data.tokens import Encoded, batches
from slora_dist.errors import ConfigError
from slora_dist.evaluate import evaluate
from slora_dist.model import dense_layers, head_parameters, ranks
from slora_dist.report import read
from slora_dist.report.tables import equal
from slora_dist.runfolder import RunFolder
from slora_dist.settings import load
from slora_dist.sparse import training
from tests.families import CAUSAL, build_causal
from tests.ranks import run_ranks
from tests.tiny import ROOT, SHORT, run, same, tiny

SECONDS = 120.0
TASK = (
    "model.task=causal_lm",
    "data.path=toy_qa",
    "data.answer=answer",
    "data.partition=quantity",
    'data.template="question : {text} answer : "',
)
MODELS = {
    name: f"model.config={{{', '.join(f'{key}: {value}' for key, value in (CAUSAL[name] | {'vocab_size': 128}).items())}}}"
    for name in CAUSAL
}
every_model = pytest.mark.parametrize("family", CAUSAL)


def documents() -> Encoded:
    """Four documents with the last tokens of each to be learned."""
    from numpy import arange, int32

    ids = [(arange(length, dtype=int32) * 7 % 40 + 4) for length in (5, 9, 7, 6)]
    return Encoded(ids, torch.zeros(4, dtype=torch.int64), [arange(len(row)) >= 3 for row in ids])


@every_model
def test_nothing_is_a_head_and_the_output_embedding_is_no_target(family: str) -> None:
    classifier = build_causal(family)
    assert classifier.head == () and head_parameters(classifier) == []
    layers = dense_layers(classifier)
    assert not any("lm_head" in name for name in layers) and len(layers) == (8 if family == "gpt2" else 14)
    assert set(ranks(classifier, LowrankPhase(rank=2))) == set(layers)


@every_model
def test_tied_weights_count_and_move_once(family: str) -> None:
    classifier = build_causal(family)
    net, shell = classifier.net, model.shell(ModelConfig(task="causal_lm", config=CAUSAL[family]), ())
    coordinates = methods.support(DensePhase(), shell, MethodConfig(), 0)
    assert coordinates.numel == sum(parameter.numel() for parameter in net.parameters())
    tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight  # type: ignore[operator]
    assert tied == (family != "llama")
    assert sum("lm_head" in slot.name for slot in coordinates.slots) == (not tied)
    coordinates.write(net, coordinates.read(net) + 1)
    assert (net.get_output_embeddings().weight is net.get_input_embeddings().weight) == tied  # type: ignore[operator]


@pytest.mark.parametrize("head", [["lm_head"], ["no_head"]])
def test_a_tied_head_cannot_train_apart(head: list[str]) -> None:
    assert build_causal("llama", head=["lm_head"]).head == ("lm_head",)
    with pytest.raises(ConfigError, match=r"model\.head"):
        build_causal("llama, tied", head=head)


@every_model
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_a_masked_gradient_is_the_dense_one_at_the_kept_entries(family: str, density: float) -> None:
    """Of a tied embedding, too, which gets its gradient from both ends of the network."""
    classifier = build_causal(family)
    net, (batch,) = classifier.net, batches(documents(), 4, 0)
    net(**batch).loss.backward()
    dense = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    coordinates = methods.support(SparsePhase(density=density), classifier, MethodConfig(), 0)
    methods.enter(SparsePhase(density=density), classifier, coordinates, 0)
    with training(net, coordinates) as leaves:
        net(**batch).loss.backward()
        for slot, leaf_n in zip(coordinates.slots, leaves.tensors, strict=True):
            expected, found = dense[slot.name], leaf_n.grad
            assert expected is not None and found is not None
            torch.testing.assert_close(found.reshape(-1), slot.take(expected), atol=1e-6, rtol=1e-4)


@every_model
def test_the_score_is_that_of_the_answers_tokens(family: str) -> None:
    net, encoded = build_causal(family).net.eval(), documents()
    losses, right = [], 0
    with torch.no_grad():
        for ids_T in encoded.ids:  # one by one, without padding
            ids = torch.from_numpy(ids_T).long()
            logits_TV = net(input_ids=ids[None]).logits[0]
            losses += cross_entropy(logits_TV[2:-1], ids[3:], reduction="none").tolist()
            right += int((logits_TV[2:-1].argmax(-1) == ids[3:]).sum())
        score = evaluate(net, encoded, 0)
        (batch,) = batches(encoded, 4, 0)
        assert float(net(**batch).loss) == pytest.approx(score.loss, rel=1e-5)
    assert len(losses) == 15 and score.loss == pytest.approx(sum(losses) / 15, rel=1e-5) and score.accuracy == right / 15


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], RunFolder]:
    folder = tmp_path_factory.mktemp("causal")
    kinds = [(family, name) for family in CAUSAL for name in (("slora", "fft") if family == "gpt2" else ("lora", "sft"))]
    more = (*SHORT, *TASK, "method.dense.rounds=2", "clients.per_round=3", "data.limit=60", "method.lowrank.lr=2e-2")
    return {(family, name): run(folder / f"{family}-{name}", *more, MODELS[family], f"method.name={name}") for family, name in kinds}


KINDS = [("gpt2", "slora"), ("gpt2", "fft"), ("llama", "lora"), ("llama", "sft"), ("llama, tied", "lora"), ("llama, tied", "sft")]


@pytest.mark.parametrize("which", KINDS, ids="-".join)
def test_perplexity_is_told_and_every_check_passes(which: tuple[str, str], runs: dict[tuple[str, str], RunFolder]) -> None:
    folder = runs[which]
    metrics, summary = folder.lines("metrics"), folder.summary()
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in metrics)
    assert summary["perplexity"] == metrics[-1]["perplexity"] < metrics[0]["perplexity"] * 1.02
    assert not [check for check in audit(folder) if check.faults]
    assert [line["num_examples"] for line in metrics] == [
        sum(len(Federation(folder.config(), None).client(client)) for client in line["clients"]) for line in metrics
    ]


def score(net: Any, folder: RunFolder) -> tuple[float, float]:
    found = evaluate(net, Federation(folder.config(), None).test(), 0)
    return found.accuracy, found.loss


@pytest.mark.parametrize("which", KINDS, ids="-".join)
def test_plain_libraries_load_what_was_judged(which: tuple[str, str], runs: dict[tuple[str, str], RunFolder], tmp_path: Path) -> None:
    folder = runs[which]
    wanted = (folder.summary()["accuracy"], pytest.approx(folder.summary()["loss"], rel=1e-4))
    assert main(["export", str(folder.path), str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert score(merged, folder) == wanted
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == (which[0] != "llama")
    if which[1] in ("lora", "slora"):
        base = AutoModelForCausalLM.from_pretrained(folder.adapter / "base")
        adapted = PeftModel.from_pretrained(base, folder.adapter)
        assert adapted.peft_config["default"].task_type == "CAUSAL_LM" and score(adapted, folder) == wanted


@pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("gpt2", ("method.name=bitfit",)),
        ("gpt2", ("method.name=houlsby", "method.houlsby.size=4")),
        ("llama", ("method.name=pfeiffer", "method.pfeiffer.size=4")),
        ("llama", ("method.name=sft", "comm.wire.topk=0.2", "comm.wire.indices=gap")),
        ("llama, tied", ("method.name=slora", "method.lowrank.rule=fedex")),
        ("llama, tied", ("method.name=lora", "method.lowrank.rule=stack")),
        ("llama, tied", ("method.name=lora", "method.lowrank.init=pissa")),
        ("llama, tied", ("method.name=slora", "method.lowrank.rule=svd", "method.sparse.mask=gradient")),
    ],
)
def test_what_classifiers_can_do_language_models_can(family: str, chosen: tuple[str, ...], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *SHORT, *TASK, "data.limit=60", MODELS[family], *chosen)
    assert not [check for check in audit(folder) if check.faults]
    assert folder.lines("metrics")[-1]["perplexity"] == folder.summary()["perplexity"]
    if "lora" in chosen[0] or "sft" in chosen[0]:
        assert main(["export", str(folder.path), str(tmp_path / "out"), "--merge"]) == 0
        assert score(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), folder)[0] == folder.summary()["accuracy"]


def play(rank: int, size: int, folder: str, overrides: tuple[str, ...]) -> None:
    from torch._C._distributed_c10d import FileStore

    from slora_dist.comm.torch_comm import TorchComm

    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS)
    run(Path(folder) / "many", *overrides, comm=comm)
    comm.close()


def test_many_ranks_end_in_the_bits_of_one(tmp_path: Path) -> None:
    overrides = (*SHORT, *TASK, MODELS["llama, tied"], "clients.per_round=3", "data.limit=60")
    run_ranks(3, play, str(tmp_path), overrides, seconds=SECONDS)
    many, one = RunFolder(tmp_path / "many"), run(tmp_path / "one", *overrides)
    assert same(many, one) and not [check for check in audit(many) if check.faults]


def test_a_run_shows_its_perplexity(runs: dict[tuple[str, str], RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from slora_dist import show

    folder = runs["gpt2", "slora"]
    show.finished(folder, folder.summary())
    told = capsys.readouterr().out
    assert f"test perplexity  {folder.summary()['perplexity']:.2f}" in told and "at the switch  perplexity" in told
    assert main(["report", str(folder.path), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "test perplexity" in page and f"{folder.summary()['perplexity']:.2f}" in page
    assert "Perplexity by rounds" in page and (tmp_path / "report" / "figures" / "perplexity-1-client.svg").exists()
    groups = read.group([read.load(runs["gpt2", name].path) for name in ("slora", "fft")])
    (cell, *_), _ = (row[1:] for row in equal(groups, "").rows)
    assert cell.startswith(f"perplexity {folder.lines('metrics')[1]['perplexity']:.2f}, ") and cell.endswith(", round 2")


def test_settings_of_the_task_that_do_not_fit_are_named() -> None:
    for overrides, setting in (
        (["data.answer=answer"], "data.answer"),
        (["model.task=causal_lm", "data.template=x"], "data.template"),
        (["model.task=causal"], "model.task"),
    ):
        with pytest.raises(ConfigError) as error:
            tiny(*overrides)
        assert error.value.setting == setting


@pytest.mark.parametrize("name", ["causal_lora", "causal_slora"])
def test_the_shipped_settings_learn(name: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / "methods" / f"{name}.yaml"
    assert load(path).model.task == "causal_lm"
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 0
    metrics = RunFolder(tmp_path / "run").lines("metrics")
    assert metrics[-1]["perplexity"] < 0.5 * metrics[0]["perplexity"] and metrics[-1]["perplexity"] < 5
