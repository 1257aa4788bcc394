"""How good the model is on the clients' own held-out documents: who holds out what, what is told of it, and what it costs."""

from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from slora_dist import adapters, methods, model, personal, show
from slora_dist.audit.checks import audit
from slora_dist.data.federation import Federation, class_names
from slora_dist.data.partition import hold_out
from slora_dist.errors import ConfigError, RunError
from slora_dist.evaluate import Tally, evaluate
from slora_dist.model import shell
from slora_dist.plan import plan
from slora_dist.report import tables
from slora_dist.report.page import Options, report
from slora_dist.report.read import group, load
from slora_dist.roundplan import present
from slora_dist.runfolder import RunFolder
from slora_dist.scalars import scalars
from tests.ranks import run_ranks
from tests.test_causal import MODELS, TASK
from tests.tiny import SHORT, run, same, tiny

ON = ("clients.holdout=0.3", "clients.eval_every=1")
KEEP = ("clients.keep=[factor_b, head]",)
SECONDS = 120.0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_a_client_holds_out_one_document_or_more_and_never_all(count: int, share: float) -> None:
    train, held = hold_out(count, share, seed=3, client=2)
    assert sorted([*train, *held]) == list(range(count)) and train == sorted(train) and held == sorted(held)
    assert len(held) == (0 if count == 1 or not share else min(count - 1, max(1, round(share * count))))
    assert hold_out(count, share, 3, 2) == (train, held)


def test_every_client_and_seed_draws_its_own() -> None:
    drawn = {tuple(hold_out(50, 0.3, seed, client)[1]) for seed in (0, 1) for client in (0, 1)}
    assert len(drawn) == 4


def test_held_out_documents_do_not_train() -> None:
    whole, halved = Federation(tiny("data.limit=60"), None), Federation(tiny("data.limit=60", *ON), None)
    assert halved.sizes == [len(halved.client(client)) for client in range(6)]
    for client in range(6):
        parts = [halved.client(client), halved.held_out(client)]
        assert sorted(row.tobytes() for part in parts for row in part.ids) == sorted(row.tobytes() for row in whole.client(client).ids)
    assert len(whole.held_out(0)) == 0


def test_figures_count_every_client_that_has_documents_alike() -> None:
    told = personal.figures([Tally(1, 10, 5.0), Tally(0, 0, 0.0), Tally(100, 100, 100.0), Tally(1, 2, 4.0)], "classification")
    assert told["count"] == 3
    assert told["accuracy"] == {"mean": pytest.approx((0.1 + 1 + 0.5) / 3), "min": 0.1, "p10": pytest.approx(0.18)}
    assert told["loss"] == {"mean": pytest.approx(3.5 / 3), "max": 2.0, "p90": pytest.approx(1.8)}
    assert personal.figures([Tally(0, 0, 0.0)], "causal_lm") == {"count": 0}
    assert personal.unpack(personal.pack(Tally(3, 2**40, 0.1))) == Tally(3, 2**40, 0.1)
    assert personal.unpack(personal.pack(Tally(1, 2, inf))).score.loss == inf, "the model is bad, the answer is not"


@pytest.mark.parametrize("tally", [Tally(3, 2, 0.1), Tally(-1, 2, 0.1), Tally(1, 2, -0.1)])
def test_a_score_that_cannot_be_is_refused(tally: Tally) -> None:
    with pytest.raises(RunError, match="a client's score that cannot be"):
        personal.unpack(personal.pack(tally))


def test_without_what_is_kept_it_is_the_score_of_the_saved_model(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *SHORT, *ON)
    net, federation = adapters.load(folder.adapter), Federation(folder.config(), None)
    scores = [evaluate(net, federation.held_out(client), 0) for client in range(6)]
    told = folder.summary()["personal"]
    assert told == folder.lines("metrics")[-1]["personal"] and told["count"] == 6
    assert told["accuracy"]["min"] == min(score.accuracy for score in scores)
    assert told["accuracy"]["p10"] == pytest.approx(np.percentile([score.accuracy for score in scores], 10))
    assert told["loss"]["mean"] == pytest.approx(sum(score.loss for score in scores) / 6, rel=1e-5)


def test_clients_are_judged_with_what_they_keep(tmp_path: Path) -> None:
    """By hand: the base, the server's A, and B and the head from each client's own file; the one that never trained has the server's."""
    folder = run(tmp_path / "run", *SHORT, *ON, *KEEP, "method.name=lora", "clients.per_round=2")
    config, federation, checkpoint = folder.config(), Federation(folder.config(), None), folder.latest()
    assert checkpoint
    classifier = model.load(config.model, federation.names, config.run.seed)
    (phase,) = config.method.resolved()
    coordinates = methods.support(phase, classifier, config.method, config.run.seed)
    methods.enter(phase, classifier, coordinates, config.run.seed)
    base_N, losses, trained = coordinates.reference(classifier.net), [], 0
    for client in range(6):
        offset_N = checkpoint.tensors["offset"].clone()
        for path in sorted((folder.path / "clients" / f"client-{client:05d}").glob("*"))[-1:]:
            state, trained = load_file(path), trained + 1
            for kind, name in (("factor_b", "kept.lowrank.factor_b"), ("head", "kept.head")):
                index_n = torch.cat([torch.arange(span.start, span.stop) for slot, span in coordinates.spans() if slot.kind == kind])
                offset_N[index_n] = state[name]
        coordinates.write(classifier.net, base_N + offset_N)
        losses.append(evaluate(classifier.net, federation.held_out(client), 0).loss)
    told = folder.lines("metrics")[-1]["personal"]
    assert trained in (3, 4) and len(set(losses)) == 6
    assert told["loss"] == {"mean": np.mean(losses), "max": max(losses), "p90": np.percentile(losses, 90)}


def test_evaluation_changes_nothing_else_and_comes_when_it_is_due(tmp_path: Path) -> None:
    often, last = run(tmp_path / "often", *SHORT, *KEEP, *ON), run(tmp_path / "last", *SHORT, *KEEP, "clients.holdout=0.3")
    assert [("personal" in line) for line in last.lines("metrics")] == [False, False, False, True]
    records = [[{**line, "personal": 0, "seconds": 0} for line in folder.lines("metrics")] for folder in (often, last)]
    assert records[0] == records[1] and often.summary()["personal"] == last.summary()["personal"]


def test_its_bytes_are_planned_and_it_counts_those_who_are_there(tmp_path: Path) -> None:
    """A client that is away as planned is not asked; neither is one of a rank that has died, which has the same effect."""
    folder = run(tmp_path / "run", *SHORT, *KEEP, "clients.away={0: [1], 3: [2, 2]}", "clients.holdout=0.3", "clients.eval_every=2")
    assert [line["personal"]["count"] for line in folder.lines("metrics") if "personal" in line] == [4, 5]
    planned = plan(folder.config(), shell(folder.config().model, class_names(folder.config())), [])
    ledger, names = folder.lines("ledger"), [phase["phase"] for phase in planned["phases"]]
    for way, kind in (("down", "evaluation"), ("up", "score")):
        found = [sum(line["payload_bytes"] for line in ledger if (line["phase"], line["kind"]) == (name, kind)) for name in names]
        assert found == [phase["evaluation_bytes"][way] for phase in planned["phases"]] and min(found) > 0
    assert planned["payload_bytes"]["control"] == sum(
        line["payload_bytes"] for line in ledger if line["kind"] in ("header", *personal.KINDS)
    )
    assert [check.name for check in audit(folder) if check.faults] == []
    assert present(tiny("clients.min_clients=1"), 1, 4, (0, 1, 3)) == [0, 2, 3, 5], "those of rank 2 have died"


def play(rank: int, size: int, folder: str, overrides: tuple[str, ...]) -> None:
    from torch._C._distributed_c10d import FileStore

    from slora_dist.comm.torch_comm import TorchComm

    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store-{size}", size), SECONDS)
    run(Path(folder) / f"on-{size}", *overrides, comm=comm)
    comm.close()


def test_any_number_of_ranks_tells_the_same_resumed_or_not(tmp_path: Path) -> None:
    overrides = (*SHORT, *ON, *KEEP, "server.evaluate=overlap")
    one, broken = run(tmp_path / "one", *overrides), run(tmp_path / "broken", *overrides, stop_after=1)
    for last in (2, 3, None):
        run(broken.path, resume=True, stop_after=last)
    for size in (2, 4):
        run_ranks(size, play, str(tmp_path), overrides, seconds=SECONDS)
    assert len([line for line in one.lines("metrics") if line["personal"]["count"] == 6]) == 4
    for other in (broken, *(RunFolder(tmp_path / f"on-{size}") for size in (2, 4))):
        assert same(one, other) and [check.name for check in audit(other) if check.faults] == []


def test_causal_models_have_perplexities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "run", *SHORT, *TASK, MODELS["gpt2"], *ON, "data.limit=60", "method.name=lora", "clients.per_round=3")
    told = folder.summary()["personal"]
    assert told["perplexity"] == {name: pytest.approx(np.exp(loss)) for name, loss in told["loss"].items()}
    capsys.readouterr()
    show.finished(folder, folder.summary())
    assert f"on the clients' own documents  perplexity {told['perplexity']['mean']:.2f}" in capsys.readouterr().out
    assert scalars(folder.lines("metrics")[-1])["clients/perplexity/max"] == told["perplexity"]["max"]
    (row,) = tables.personal(group([load(folder.path)])).rows
    assert row[1:4] == ["0", "4", f"{100 * told['accuracy']['mean']:.1f} %"] and row[-1] == f"{told['perplexity']['max']:.2f}"
    page = report([folder.path], tmp_path / "report", Options()).read_text()
    assert "On the clients&#39; own documents" in page


def test_settings_that_do_not_fit_are_named() -> None:
    for overrides in (["clients.eval_every=2"], ["clients.holdout=1.0"], ["clients.holdout=-0.1"]):
        with pytest.raises(ConfigError) as error:
            tiny(*overrides)
        assert error.value.setting == "clients.holdout"
