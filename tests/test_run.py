"""Whole runs: the same bits on any number of ranks, stopped and resumed or not, and bytes that are what was planned."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slora_dist import settings
from slora_dist.audit.checks import audit
from slora_dist.config import PRESETS
from slora_dist.data.federation import class_names
from slora_dist.ledger import totals
from slora_dist.model import shell
from slora_dist.plan import plan
from slora_dist.runfolder import RECORDS, RunFolder
from slora_dist.summary import summarize
from tests.ranks import run_ranks
from tests.tiny import ROOT, SHORT, TINY, run, same, tiny

THREE = "[{kind: sparse, rounds: 1}, {kind: lowrank, rounds: 1, residual: keep}, {kind: lowrank, rounds: 2, residual: %s}]"
RESUMED = {
    "plain": (),
    "keep": ("method.lowrank.residual=keep", "method.lowrank.remainder=keep"),
    "adam": ("server.optimizer=adam", "server.momentum=0.9", "server.lr=0.01", "server.eval_every=0"),
    "momentum": ("server.momentum=0.5", "server.weighting=examples", "method.name=primed_fft", "comm.wire.values=bfloat16"),
    "keep twice": ("method.name=custom", f"method.phases={THREE % 'keep'}"),
    "keep once of two": ("method.name=custom", f"method.phases={THREE % 'drop'}"),
    "keep nothing": ("method.sparse.scope=targets", "method.lowrank.remainder=keep"),
    "keep biases": ("method.name=custom", "method.phases=[{kind: bitfit, rounds: 2}, {kind: lowrank, remainder: keep}]"),
}


def short(*overrides: str) -> tuple[str, ...]:
    return (*SHORT, "method.dense.rounds=2", *overrides)


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_after_every_round_and_resumed_it_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    """One run is stopped and resumed after each of its rounds: in either phase, at the switch and after it."""
    overrides = short(*RESUMED[name])
    straight = run(tmp_path / "straight", *overrides)
    broken = run(tmp_path / "broken", *overrides, stop_after=1)
    rounds = len(straight.lines("metrics"))
    for last in range(2, rounds + 1):
        assert len(broken.lines("metrics")) == last - 1 and not (broken.path / "summary.json").exists()
        run(broken.path, resume=True, stop_after=last)
    assert same(straight, broken)
    assert straight.summary()["payload_bytes"]["by_phase"] == broken.summary()["payload_bytes"]["by_phase"]


def test_a_run_that_died_before_its_pointer_goes_on_from_the_round_before(tmp_path: Path) -> None:
    """What a death between the lines of a round and its checkpoint leaves is dropped, not counted twice."""
    straight, broken = run(tmp_path / "straight", *short()), run(tmp_path / "broken", *short(), stop_after=2)
    for name in RECORDS:
        broken.append(name, [{**broken.lines(name)[-1], "round": 3}])
    with (broken.path / "ledger.jsonl").open("a") as file:
        file.write('{"rank": 0, "rou')
    (broken.path / "checkpoint" / ".round-00003.part").mkdir()
    run(broken.path, resume=True)
    assert same(straight, broken)
    assert straight.summary()["payload_bytes"]["by_phase"] == broken.summary()["payload_bytes"]["by_phase"]


def test_a_stop_before_what_is_done_plays_no_round(tmp_path: Path) -> None:
    """In the middle of a phase, and where the next one would begin."""
    for done in (1, 2):
        stopped = run(tmp_path / str(done), *short(), stop_after=done)
        run(stopped.path, resume=True, stop_after=1)
        assert len(stopped.lines("metrics")) == done and not (stopped.path / "summary.json").exists()


def test_a_finished_run_resumed_says_the_same_again(tmp_path: Path) -> None:
    straight, again = run(tmp_path / "straight", *short()), run(tmp_path / "again", *short())
    run(again.path, resume=True)
    assert same(straight, again)


WIRES = {
    "plain": (),
    "bfloat16": ("comm.wire.values=bfloat16", "comm.wire.indices=int32"),
    "float16": ("comm.wire.values=float16", "comm.wire.indices=gap"),
    "each way": ("comm.wire.up_values=int4", "comm.wire.down_values=int8", "comm.wire.indices=gap+zstd"),
}


def accounts(*overrides: str) -> dict[str, Any]:
    config = tiny(*overrides)
    return plan(config, shell(config.model, class_names(config)), [5.0])


def check_bytes(folder: RunFolder, *overrides: str) -> None:
    planned, summary, counted = accounts(*overrides), folder.summary(), totals(folder.lines("ledger"))
    for told in (summary["payload_bytes"], counted):
        assert {way: told[way] for way in ("up", "down", "by_phase")} == {
            way: planned["payload_bytes"][way] for way in ("up", "down", "by_phase")
        }
    assert summary["full_finetuning_payload_bytes"] == planned["full_finetuning_payload_bytes"]
    headers = [line["payload_bytes"] for line in folder.lines("ledger") if line["kind"] == "header"]
    assert sum(headers) == planned["payload_bytes"]["control"]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", PRESETS)
def test_planned_bytes_are_the_ledgers(name: str, wire: str, tmp_path: Path) -> None:
    once = [f"method.{kind}.rounds=1" for kind in ("sparse", "dense", "lowrank")]
    overrides = short(*once, f"method.name={name}", *WIRES[wire], "data.limit=24")
    check_bytes(run(tmp_path / "run", *overrides), *overrides)


def test_clients_that_are_away_are_planned_as_such(tmp_path: Path) -> None:
    """In a round of three of them two clients are left."""
    overrides = short("clients.away={0: [2, 3], 1: [2, 3], 2: [2, 3], 3: [2, 3]}", "data.limit=24")
    folder = run(tmp_path / "run", *overrides)
    check_bytes(folder, *overrides)
    message = accounts(*overrides)["phases"][0]["message_bytes"]["up"]
    assert folder.summary()["payload_bytes_per_client_and_round"]["sparse"]["up"] == message
    full, classifier = folder.summary()["full_finetuning_payload_bytes"], shell(folder.config().model, class_names(folder.config()))
    records = folder.lines("metrics")
    messages = sum(len(record["clients"]) for record in records)
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(one | {"clients": one["clients"][1:]}) + "\n" for one in records))
    died = summarize(folder.config(), folder, classifier, None, 1)["full_finetuning_payload_bytes"]
    assert died == {way: nbytes * (messages - len(records)) // messages for way, nbytes in full.items()}, "a death was in no plan"


@pytest.mark.parametrize("overrides", [(), ("clients.away={0: [1], 1: [1], 2: [2, 2]}",), ("clients.per_round=4", "clients.away={0: [1]}")])
def test_full_finetuning_costs_what_it_is_said_to_cost(overrides: tuple[str, ...]) -> None:
    """Whoever is away is away from the baseline, too; minutes are those of one client that is always there."""
    planned = accounts("method.name=fft", "clients.per_round=5", *overrides)
    assert planned["full_finetuning_payload_bytes"] == {way: planned["payload_bytes"][way] for way in ("up", "down")}
    assert planned["full_finetuning_minutes"] == pytest.approx(planned["minutes"])


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_kept_at_the_switch_is_planned_too(wire: str, tmp_path: Path) -> None:
    overrides = short("method.lowrank.residual=keep", *WIRES[wire], "data.limit=24")
    folder = run(tmp_path / "run", *overrides)
    check_bytes(folder, *overrides)
    lowrank = accounts(*overrides)["phases"][1]
    assert lowrank["handover_bytes"] > 0
    messages = 3 * lowrank["rounds"] * lowrank["message_bytes"]["down"]
    assert lowrank["payload_bytes"]["down"] == messages + 6 * lowrank["handover_bytes"]


def torchrun(size: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "slora_dist", "train"]
    played = subprocess.run([*command, *arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240, check=False)
    assert played.returncode == 0, played.stderr[-4000:]


@pytest.mark.launcher
@pytest.mark.parametrize(("size", "who"), [(2, "root"), (4, "ranks")])
def test_any_number_of_ranks_ends_in_the_bits_of_one(size: int, who: str, tiny_run: RunFolder, tmp_path: Path) -> None:
    torchrun(size, str(TINY), f"server.svd={who}", "--out", str(tmp_path / "run"))
    many = RunFolder(tmp_path / "run")
    assert same(many, tiny_run)
    assert many.summary()["world_size"] == size
    assert many.summary()["payload_bytes"]["by_phase"] == tiny_run.summary()["payload_bytes"]["by_phase"]


OVERLAP = ("method.sparse.rounds=3", "server.evaluate=overlap")


def _play(rank: int, size: int, out: Path, store: str, stop_after: int | None) -> list[str]:
    """Play on this rank; return rank 0's operations in order, as its place in the run tells them."""
    from torch._C._distributed_c10d import FileStore

    from slora_dist.comm.torch_comm import TorchComm

    comm = TorchComm("gloo", rank, size, FileStore(str(out.parent / store), size), 40.0)
    folder = run(out, *short(*OVERLAP), resume=stop_after is None, stop_after=stop_after, comm=comm)
    comm.close()
    spans = sorted(folder.lines("timeline"), key=lambda span: span["began"])
    return [f"{span['what']} {span['round']}" for span in spans if span["rank"] == 0]


def test_a_model_judged_while_others_train_has_the_same_score(tmp_path: Path) -> None:
    """A stop falls between a round and its judgement. Each model is judged before the server moves it, and its record comes in order."""
    inline, out = run(tmp_path / "inline", *short(OVERLAP[0])), tmp_path / "overlap"
    run_ranks(2, _play, out, "first", 1)
    assert RunFolder(out).latest().values["unjudged"]["round"] == 1  # type: ignore[union-attr]
    assert [line["round"] for line in RunFolder(out).lines("metrics")] == [1], "a run that stops has all its records"
    spans, _ = run_ranks(2, _play, out, "second", None)
    assert same(inline, RunFolder(out))
    order = [span for span in spans if span.split()[0] in ("aggregate", "evaluate")]
    assert order[:5] == ["aggregate 1", "evaluate 2", "aggregate 2", "evaluate 3", "aggregate 3"]


def _measured(rank: int, size: int, out: Path, fast: str, stop_after: int | None) -> None:
    """Play on this rank, where ``fast`` (gathered, reduced) is the faster way up as ``comm.collective: auto`` measures them."""
    from torch._C._distributed_c10d import FileStore

    from slora_dist import upload
    from slora_dist.comm.torch_comm import TorchComm

    def fastest(operation: Callable[[], None]) -> float:
        for _ in range(1 + upload.PROBES):
            operation()
        return float(operation.__name__ != fast)

    upload._fastest = fastest
    comm = TorchComm("gloo", rank, size, FileStore(str(out.parent / fast), size), 40.0)
    run(out, *short("comm.collective=auto", "data.limit=24"), resume=stop_after is None, stop_after=stop_after, comm=comm)
    comm.close()


def test_a_phase_that_is_resumed_keeps_the_way_up_that_it_began_with(tmp_path: Path) -> None:
    """It is told, not measured again: the two differ in their last bits. The next phase measures for itself."""
    run_ranks(2, _measured, tmp_path / "run", "reduced", 1)
    run_ranks(2, _measured, tmp_path / "run", "gathered", None)
    folder = RunFolder(tmp_path / "run")
    way = {line["round"]: line["op"] for line in folder.lines("ledger") if line["direction"] == "up"}
    assert way == {1: "reduce", 2: "reduce", 3: "gather", 4: "gather"}
    assert not [fault for check in audit(folder) if not check.name.startswith("counters") for fault in check.faults or ()]


@pytest.mark.launcher
def test_resumed_in_another_world_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    """One rank to the middle of the second phase, with a changed base; three ranks to the end."""
    overrides = short("method.lowrank.residual=keep", "server.momentum=0.5")
    straight, broken = run(tmp_path / "straight", *overrides), run(tmp_path / "broken", *overrides, stop_after=3)
    torchrun(3, "--resume", str(broken.path))
    assert same(straight, broken)
    assert {line["rank"] for line in broken.lines("ledger")} == {0, 1, 2}


def test_settings_that_are_read_back_are_those_of_the_run(tiny_run: RunFolder) -> None:
    assert tiny_run.config() == settings.load(TINY)
