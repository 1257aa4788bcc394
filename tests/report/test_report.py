"""Reports: every number is derived anew here, from the files or by head; the page is whole, escaped and needs nothing from outside."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from slora_dist.cli import main
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.data.federation import class_names
from slora_dist.errors import ConfigError
from slora_dist.job import Job
from slora_dist.model import shell
from slora_dist.plan import plan
from slora_dist.report import curves, gantt, tables, traffic
from slora_dist.report.blocks import Table
from slora_dist.report.page import Options, report
from slora_dist.report.predicted import measured, predicted
from slora_dist.report.read import Run, group, load
from slora_dist.runfolder import RunFolder
from slora_dist.show import size
from slora_dist.timing import PARTS, step_settings
from tests.ranks import run_ranks
from tests.report.made import make
from tests.tiny import SHORT, tiny

RISING = (0.2, 0.4, 0.3, 0.6)
KEEP = (*SHORT, "method.lowrank.residual=keep")


def cell(table: Table, row: int, column: str) -> str:
    return table.rows[row][list(table.columns).index(column)]


def planned_bytes(run: Run) -> tuple[int, int]:
    """One client's bytes and all clients', as the plan foretells them."""
    costs = plan(run.config, shell(run.config.model, class_names(run.config)), [5.0])
    one = sum(2 * phase["message_bytes"]["up"] * phase["rounds"] + phase["handover_bytes"] for phase in costs["phases"])
    return one, costs["payload_bytes"]["up"] + costs["payload_bytes"]["down"]


def play(rank: int, ranks: int, folder: str) -> None:
    comm = TorchComm("gloo", rank, ranks, FileStore(f"{folder}/store", ranks), 60.0)
    Job(tiny(*KEEP), comm, Path(folder) / "many", torch.device("cpu")).run(False, None)
    comm.close()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on three ranks whose base takes over what the factors leave out, so that the switch has a message of its own."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(3, play, str(folder), seconds=300.0)
    return load(folder / "many")


# ---- real runs


def test_a_run_in_numbers(tiny_run: RunFolder) -> None:
    run = load(tiny_run.path)
    table = tables.runs(group([run]))
    one, payload = planned_bytes(run)
    summary = json.loads((tiny_run.path / "summary.json").read_text())
    assert cell(table, 0, "accuracy") == f"{100 * summary['accuracy']:.1f} %"
    assert cell(table, 0, "one client") == size(one)
    assert cell(table, 0, "all clients") == size(payload) == size(summary["payload_bytes"]["up"] + summary["payload_bytes"]["down"])
    assert cell(table, 0, "of full fine-tuning") == f"{100 * payload / sum(summary['full_finetuning_payload_bytes'].values()):.2f} %"
    assert "network time" not in table.columns


def test_bytes_of_a_client_and_of_ranks_agree_with_plan_and_ledger(many: Run) -> None:
    one, payload = planned_bytes(many)
    end = curves.points(many)[-1]
    assert (end.client, end.payload) == (one, payload)
    bills = tables.payload(tables.bills(group([many])))
    assert [row[1] for row in bills.rows] == ["sparse", "lowrank"]
    counted = {key: int(count.replace(",", "")) for *key, count, _ in tables.kinds(many).rows for key in [tuple(key)]}
    assert sum(count for (_, way, _), count in counted.items() if way != "control") == payload
    assert all(counted[key] for key in counted if key[1] != "control")


def test_layers_agree_on_a_real_network_stack(many: Run) -> None:
    seen = traffic.layers(many)
    both = sum(line["transport_bytes"] for line in many.ledger)
    assert 0 < seen.transport < both and seen.tcp_sent
    assert seen.overhead is not None and -0.05 < seen.overhead < 0.5, "TCP carries the payload once, and little besides"
    rounds = [bar for phase in many.phases for bar in gantt.bars(many, gantt.median_round(many, phase))]
    assert {"train", "move", "wait", "aggregate", "evaluate"} <= {bar.what for bar in rounds}
    assert {bar.rank for bar in rounds} == {0, 1, 2} and min(bar.begins for bar in rounds) >= 0


def test_a_rank_that_plays_no_client_of_the_round_does_not_count(many: Run) -> None:
    down = {"round": 1, "direction": "down", "clients": 2, "payload_bytes": 20, "rank": 1}
    handed = down | {"clients": 5, "payload_bytes": 500}
    idle = [handed | {"rank": 2}, down | {"rank": 2, "clients": 0, "payload_bytes": 0}]
    ledger = [handed, down, down | {"direction": "up"}, down | {"direction": "control"}, *idle]
    assert replace(many, ledger=ledger).client == {1: {"up": 10, "down": 110}}


# ---- made runs: budgets, targets, speed


def test_equal_budgets_take_the_last_measurement_within(tmp_path: Path) -> None:
    rich = make(tmp_path / "rich", (0.3, None, None, 0.7), "method.name=fft", "method.dense.rounds=4")
    poor = make(tmp_path / "poor", RISING)
    table = tables.equal(group([load(rich), load(poor)]), "All")
    # least spent: 4 rounds; 2 x (2 x 1000 + 2 x 500) B; 4 x 9 s; 4 x 30 s
    assert list(table.columns)[1:] == [
        "equal rounds: 4", "equal bytes of one client: 6.0 kB", "equal time: 36.0 s", "equal network time: 2.0 min",
    ]  # fmt: skip
    assert table.rows[0][1:] == ["70.0 %, round 4", "-", "70.0 %, round 4", "70.0 %, round 4"], "20 kB a round are beyond 6 kB"
    assert table.rows[1][1:3] == ["60.0 %, round 4", "60.0 %, round 4"]
    assert table.rows[1][3] == "30.0 %, round 3", "its switch took 0.75 s, so that round 4 ends beyond 36 s"
    shaped = load(make(tmp_path / "unfinished", RISING[:2], finished=False, network=False))
    three = tables.equal([*group([load(rich), load(poor)]), *group([shaped])], "All")
    assert three.rows[2][-1] == "-" and three.rows[0][1:] == table.rows[0][1:], "a run without links has spent nothing on them"
    between = curves.within(load(rich), "round", 3)
    assert between and between.accuracy == 0.3, "nothing is interpolated"


def test_costs_to_targets(tmp_path: Path) -> None:
    runs = [load(make(tmp_path / f"{seed}", found, f"run.seed={seed}")) for seed, found in enumerate([RISING, (0.1, 0.1, 0.45, 0.5)])]
    table = tables.targets(group(runs), (0.4, 0.6, 0.9), (5.0, 0.001), "Costs")
    assert [row[1:3] for row in table.rows] == [["≥ 40.0 %", "2.5"], ["≥ 60.0 %", "4 (1 of 2)"], ["≥ 90.0 %", "-"]]
    # to 60 %: 6000 B at 1 kbit/s are 48 s; training 4 x (8 s / 2 clients) and a switch of 0.75 s
    assert cell(table, 1, "at 0.001 Mbit/s") == f"{(48 + 16 + 0.75) / 60:.2f} min"
    assert cell(table, 1, "of it training") == "16.8 s"
    assert cell(table, 1, "one client") == "6.0 kB"
    assert set(table.rows[2][2:]) == {"-"}


def test_speed_leaves_waiting_out(tmp_path: Path) -> None:
    run = load(make(tmp_path / "run", RISING))
    table = tables.bandwidth(run)
    assert list(table.rows[0]) == ["broadcast", "other ranks", "4.0 kB", "4.00 s", "8.00 s", "0.0 Mbit/s"]
    assert traffic.by_op(run.ledger)["gather", "other ranks"].bandwidth == 4 * 2000 / (4 * 2.0)
    seen = traffic.layers(run)
    assert (seen.payload, seen.transport, seen.tcp_sent, seen.interfaces) == (12_000, 12_000, 13_200, {"north eth0": 13_200})
    assert seen.overhead == pytest.approx(0.1) and seen.infiniband == {"north mlx5_0/1": 64}


def test_a_collective_fills_the_gaps_that_training_leaves(tmp_path: Path) -> None:
    bars = [bar for bar in gantt.bars(load(make(tmp_path / "run", RISING)), 1) if bar.rank == 1]
    by_what = {what: [(bar.begins, bar.seconds) for bar in bars if bar.what == what] for what in ("wait", "move", "train")}
    assert sorted(by_what["train"]) == [(3.0, 3.0), (6.0, 1.0)]
    assert by_what["wait"] == [(0.0, 1.0), (7.0, 1.0)], "the gather began at 4 s, but the rank trained until 7 s"
    assert by_what["move"] == [(1.0, 2.0), (8.0, 2.0)]
    assert list(gantt.gaps(0.0, 3.0, [gantt.Bar(1, "train", 1.0, 1.0)])) == [(0.0, 1.0), (2.0, 2.0)]


def test_a_prediction_stands_beside_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load(make(tmp_path / "run", RISING, network=False))
    found = measured(run)
    # rank 1 moved 2 of the broadcast's 3 s and trained 4 s; rank 0 was 3 s in the gather; 10 s less evaluation 1 s, communication 2 s
    assert found["sparse"] == {"broadcast": 3.0, "train": 4.0, "upload": 0.0, "server": 7.0, "control": 0.0, "round": 9.0}
    emulated = measured(load(make(tmp_path / "links", RISING)))
    assert emulated["lowrank"] == {"broadcast": 10.0, "train": 5.0, "upload": 14.0, "server": 1.0, "control": 0.0, "round": 30.0}
    verbs = [
        {"verb": verb, "bytes": nbytes, "seconds": nbytes / 1e6, "own_seconds": nbytes / 1e6}
        for verb in ("broadcast", "gather", "reduce")
        for nbytes in (64, 1 << 20)
    ]
    local = {"step_seconds": 0.1, "server_seconds": 0.2}
    machine = {"world": {"size": 2}, "verbs": verbs, "phases": {"sparse": local, "lowrank": local}, "documents": [8] * 4}
    machine["settings"] = step_settings(run.config)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine))
    foretold = predicted(run, path)
    assert foretold and set(foretold) == {"sparse", "lowrank"} and set(foretold["sparse"]) == {*PARTS, "round"}
    table = tables.prediction(foretold, found)
    assert list(table.rows[1][:2]) == ["sparse", "train"] and table.rows[1][4] == f"{foretold['sparse']['train'] / 4:.2f}"
    assert "A round, predicted and measured" in report([run.path], tmp_path / "out", Options(machine=path)).read_text()
    path.write_text(json.dumps(machine | {"world": {"size": 3}}))
    assert predicted(run, path) is None and f"no prediction for {run.path}: --machine: measured on 3 ranks" in capsys.readouterr().err
    path.write_text(json.dumps(machine | {"settings": machine["settings"] | {"run.threads": 2}}))
    assert predicted(run, path) is None and "measured with run.threads 2, and here it is 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--machine"):
        predicted(run, tmp_path / "none.json")


# ---- names


def test_seeds_are_one_group_and_names_tell_the_rest_apart(tmp_path: Path) -> None:
    wanted = {
        "a": ("run.seed=0",), "b": ("run.seed=1", "comm.timeout=5"), "c": ("method.sparse.density=0.01", "method.sparse.lr=1e-2"),
        "d": ("method.name=lora", "method.lowrank.rounds=4"),
    }  # fmt: skip
    groups = group([load(make(tmp_path / name, RISING, *overrides)) for name, overrides in wanted.items()])
    assert [(each.name, each.panel, len(each.runs)) for each in groups] == [
        ("slora, density 0.1", "", 2), ("slora, density 0.01", "", 1), ("lora", "", 1),
    ]  # fmt: skip
    assert len({(each.colour, each.dash) for each in groups}) == 3
    means = curves.curve(groups[0])
    assert [mean.value("round") for mean in means] == [1, 2, 3, 4] and means[0].span("accuracy") == (0.2, 0.2)


def test_places_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    wanted = [("data.path=/d/20news/train.parquet",), ("data.path=/d/r8/train.parquet",)]
    groups = group([load(make(tmp_path / str(at), RISING, *overrides)) for at, overrides in enumerate(wanted)])
    assert [each.name for each in groups] == ["slora, 20news/train.parquet", "slora, r8/train.parquet"]


def test_splits_get_panels_where_methods_meet_in_them(tmp_path: Path) -> None:
    splits = (("data.partition=iid",), ("data.partition=dirichlet", "data.alpha=0.1"))
    methods = (("method.name=slora",), ("method.name=sft", "method.sparse.rounds=4"))
    runs = [load(make(tmp_path / f"{at}-{to}", RISING, *one, *other)) for at, one in enumerate(splits) for to, other in enumerate(methods)]
    groups = group(runs)
    assert [(each.name, each.panel) for each in groups] == [
        ("slora", "iid"), ("sft", "iid"), ("slora", "dirichlet 0.1"), ("sft", "dirichlet 0.1"),
    ]  # fmt: skip
    assert groups[0].colour == groups[2].colour != groups[1].colour
    alone = group(runs[::2])
    assert [(each.name, each.panel) for each in alone] == [("slora, iid", ""), ("slora, dirichlet 0.1", "")], "one method: one panel"


def test_many_names_share_the_colour_of_their_method(tmp_path: Path) -> None:
    methods = ("sft", "slora", "lora", "fft")
    masks = [("random", 0.1), ("random", 0.01), ("product", 0.1)]
    wanted = [(method, mask) for method in methods for mask in (masks if method[0] == "s" else masks[:1])]
    runs = [
        load(make(tmp_path / str(at), (), f"method.name={name}", f"method.sparse.mask={mask}", f"method.sparse.density={share}"))
        for at, (name, (mask, share)) in enumerate(wanted)
    ]
    found = {each.name: (each.colour, each.dash) for each in group(runs)}
    assert len(found) == len(set(found.values())) == 8
    for rest in ("density 0.1, random", "density 0.01, random", "density 0.1, product"):
        assert found[f"sft, {rest}"][0] == found["sft, density 0.1, random"][0] != found[f"slora, {rest}"][0]
        assert found[f"sft, {rest}"][1] == found[f"slora, {rest}"][1]


# ---- the page


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, references and text."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    name = "<b>&\"x'|"
    paths = [
        make(tmp_path / name, RISING, "run.seed=1", "model.tokenizer='<i>|'"),
        make(tmp_path / "going", (None, 0.3, 0.2), finished=False),
    ]
    out = tmp_path / "out"
    page = report(paths, out, Options((0.3,)))
    text = page.read_text()
    parsed = Page(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(reference.startswith("#") or reference == "data:," for reference in parsed.references), parsed.references
    assert {reference[1:] for reference in parsed.references if reference.startswith("#")} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(parsed.ids)
    assert not re.search(r"url\((?!#)|@import", text) and "script" not in parsed.tags
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;&amp;" in text
    assert "unfinished, 3 of 4 rounds" in text and "prefers-color-scheme: dark" in text
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert {
        f"{stem}.{kind}" for kind in ("svg", "png") for stem in ("accuracy-1-round", "accuracy-1-network", "payload", "energy-1")
    } <= drawn
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert not [found for svg in drawings for found in re.findall(r"(?:fill|stroke): (#\w+)", svg)], "drawings take the page's colours"
    notes = (out / "report.md").read_text()
    assert "<b>" not in notes and set(re.findall(r"\]\(([^)]+)\)", notes)) == {f"figures/{each}" for each in drawn if each.endswith("svg")}
    rows = [line for line in notes.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) > 2 for row in rows)


def test_the_same_runs_make_the_same_page(tmp_path: Path) -> None:
    run = make(tmp_path / "run", RISING)
    pages = [report([run], tmp_path / name, Options()) for name in ("one", "two")]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert (pages[0].parent / "figures/payload.svg").read_bytes() == (pages[1].parent / "figures/payload.svg").read_bytes()


def test_a_run_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    text = report([make(tmp_path / "run", (), finished=False)], tmp_path / "out", Options()).read_text()
    assert "unfinished, 0 of 4 rounds" in text


def test_the_command(tiny_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tiny_run.path), "--out", str(tmp_path / "out"), "--target", "0.2", "0.9", "--mbit", "1"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().count("at 1 Mbit/s") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "{run}/adapter"], "none of 2 folders has a config.json"),
        (["{run}/adapter/base"], "adapter/base"),
        (["{run}", "--target", "50"], "--target"),
        (["{run}", "--mbit", "0"], "--mbit"),
        (["{run}", "--out", "{run}/config.json"], "--out"),
    ],
)
def test_bad_input_is_one_line(tiny_run: RunFolder, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *(word.format(run=tiny_run.path) for word in arguments)]) == 2
    said = capsys.readouterr()
    assert named in said.out + said.err and (said.out + said.err).count("\n") == 1


def test_of_several_folders_those_without_a_run_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").mkdir()
    folders = [str(make(tmp_path / "run", RISING)), str(tmp_path / "notes")]
    assert main(["report", *folders, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path / 'notes'} is left out: it has no config.json" in said and said.count("\n") == 1


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", RISING)
    (folder / "metrics.jsonl").write_text("{oops}\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        load(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "config.json").write_text(json.dumps({"settings": tiny().model_dump()}))
    with pytest.raises(ConfigError, match="something else"):
        load(folder)
