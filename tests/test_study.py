"""Studies: which cells a file means, how their runs are played, and tables that are re-derived by hand."""

import csv
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from slora_dist.cli import main
from slora_dist.errors import ConfigError
from slora_dist.report.curves import points
from slora_dist.report.read import load
from slora_dist.runfolder import RunFolder
from slora_dist.study import charts, grid, play, tables
from tests.tiny import ROOT, SHORT, TINY, run, same, tensors

STUDIES = sorted([*(ROOT / "configs/studies").glob("*.yaml"), *(ROOT / "configs/paper").glob("study_*.yaml")])
SMALL = dict(yaml.safe_load(text.replace("=", ": ")).popitem() for text in SHORT)


def write(folder: Path, **entries: Any) -> Path:
    """Write a study of the tiny settings and return its path; entries that are None are left out."""
    path = folder / "study.yaml"
    tree = {
        "base": str(TINY),
        "set": SMALL,
        "seeds": [0, 1],
        "splits": {"skewed": {"data.partition": "pathological"}, "even": {"data.partition": "iid"}},
        "methods": {"fft": {"method.name": "fft", "method.dense.rounds": 2}, "slora": {}},
    }
    path.write_text(yaml.safe_dump({key: value for key, value in (tree | entries).items() if value is not None}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_valid(path: Path) -> None:
    assert grid.read(path).cells


def test_the_small_study_has_the_runs_it_says() -> None:
    cells = grid.read(ROOT / "configs/studies/small.yaml").cells
    assert len(cells) == 2 * (10 + 4)
    assert len({sum(phase.rounds for phase in cell.config.method.resolved()) for cell in cells}) == 1, "equal rounds for all"


def test_seeds_are_outermost_and_every_axis_has_its_folder(tmp_path: Path) -> None:
    axes = {"rank": {"r2": {"method.lowrank.rank": 2}, "r4": {"method.lowrank.rank": 4}}}
    cells = grid.read(write(tmp_path, axes=axes, skip=[{"method": "fft", "rank": "r4"}])).cells
    assert [cell.name for cell in cells[:3]] == ["r2/skewed/fft/seed-0", "r2/skewed/slora/seed-0", "r2/even/fft/seed-0"]
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    assert all(cell.config.method.lowrank.rank == int(cell.labels["rank"][1:]) and cell.config.run.seed == cell.seed for cell in cells)
    assert all((cell.config.data.partition == "iid") == (cell.labels["split"] == "even") for cell in cells)


def test_only_and_skip_choose_cells(tmp_path: Path) -> None:
    only = [{"split": "skewed"}, {"split": "even", "method": ["slora"]}]
    cells = grid.read(write(tmp_path, only=only, skip=[{"seed": 1, "method": "slora"}])).cells
    assert [cell.name for cell in cells] == ["skewed/fft/seed-0", "skewed/slora/seed-0", "even/slora/seed-0", "skewed/fft/seed-1"]


@pytest.mark.parametrize(
    ("entries", "setting"),
    [
        ({"base": None}, "base"),
        ({"metods": {}}, "metods"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"seeds": []}, "seeds"),
        ({"seeds": ["a"]}, "seeds.0"),
        ({"seeds": [1, 0, 1]}, "seeds"),
        ({"ranks": 0}, "ranks"),
        ({"targets": [50]}, "targets.0"),
        ({"methods": {"a b": {}}}, "axes.method"),
        ({"axes": {"rank": {}}}, "axes.rank"),
        ({"axes": {"method": {"x": {}}}}, "axes.method"),
        ({"only": [{"split": "odd"}]}, "only.0.split"),
        ({"skip": [{"splits": "even"}]}, "skip.0.splits"),
        ({"skip": [{"split": ["even", "skewed"]}]}, "only"),
        ({"methods": {"x": {"method.nme": "fft"}}}, "method.x: method.nme"),
        ({"set": {"clients.per_round": 9}}, "set: clients.per_round"),
    ],
)
def test_the_entry_that_does_not_fit_is_named(entries: dict[str, Any], setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        grid.read(write(tmp_path, **entries))
    assert caught.value.setting.endswith(setting) and "\n" not in str(caught.value)


def test_runs_are_played_resumed_skipped_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One cell is new and needs a secret, one was stopped after its first round, one cannot be played: the others are played."""
    fft = {"method.name": "fft", "method.dense.rounds": 2, "comm.secret": "required"}
    methods = {"fft": fft, "slora": {}, "lost": {"data.path": "nowhere.csv"}}
    path, out = write(tmp_path, seeds=[0], splits={}, methods=methods, targets=[0.01]), tmp_path / "out"
    overrides = [f"{name}={value}" for name, value in SMALL.items()]
    run(out / "slora/seed-0", *overrides, stop_after=1)
    assert main(["study", str(path), "--out", str(out), "--jobs", "2"]) == 1
    told = capfd.readouterr().out
    assert "lost/seed-0: failed: slora-dist [rank 0] error: data.path: " in told and "3 of 3 runs to do" in told
    assert same(RunFolder(out / "slora/seed-0"), run(tmp_path / "straight", *overrides))
    assert tensors(RunFolder(out / "fft/seed-0")) and "2 of 3 runs are finished" in (out / "tables.md").read_text()
    assert {file.name for file in (out / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("accuracy_by_round", "accuracy_by_minutes", "gap_to_fft") for kind in ("svg", "png")
    }
    assert main(["study", str(path), "--out", str(out), "--cell", "1"]) == 0
    assert "0 of 1 runs to do" in capfd.readouterr().out
    assert main(["study", str(path), "--out", str(out), "--dry-run"]) == 0
    assert [line.split()[1] for line in capfd.readouterr().out.splitlines()] == ["finished", "finished", "new"]


def test_a_run_with_other_settings_is_not_taken_for_the_cells(tmp_path: Path) -> None:
    study = grid.read(write(tmp_path))
    overrides = [text for text in study.cells[1].overrides if not text.startswith("run.seed")]
    run(tmp_path / study.cells[1].name, *overrides, "run.seed=7", stop_after=1)
    with pytest.raises(ConfigError) as caught:
        play.play(study, tmp_path, study.cells, 1, print)
    assert caught.value.setting == "skewed/slora/seed-0: run.seed"


def test_tables_take_no_run_with_other_settings_for_a_cells(tmp_path: Path) -> None:
    path = write(tmp_path, seeds=[0])
    study = grid.read(path)
    run(tmp_path / study.cells[1].name, *(f"{name}={value}" for name, value in SMALL.items()), "run.seed=7")
    assert main(["study", str(path), "--out", str(tmp_path), "--tables-only"]) == 2
    assert not (tmp_path / "tables.md").exists()


def test_a_value_reaches_the_run_as_the_study_has_it(tmp_path: Path) -> None:
    odd = {"model.config.layer_norm_eps": 1e-12, "data.text": "two\nlines: 'and' \U0001f600", "data.labels": ["yes", "no", "1"]}
    (cell, *_) = grid.read(write(tmp_path, set=odd)).cells
    assert cell.config.model.config["layer_norm_eps"] == 1e-12
    assert (cell.config.data.text, cell.config.data.labels) == (odd["data.text"], odd["data.labels"])
    dated = write(tmp_path, set={"data.split": datetime.date(2024, 1, 1)})
    with pytest.raises(ConfigError, match=r"^set: data\.split: "):
        grid.read(dated)


def test_ranks_are_started_by_torchrun(tmp_path: Path) -> None:
    study = grid.read(write(tmp_path, ranks=3))
    words = play.command(study, study.cells[0], Path("out"), resume=True)
    assert words[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]
    assert words[-2:] == ["--resume", "out/skewed/fft/seed-0"]


def test_the_array_job_has_a_task_for_each_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, ranks=2)
    assert main(["study", str(path), "--slurm", "--dry-run", "--jobs", "3", "--partition", "gpu", "--out", "a b"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-7%3\n" in text and "#SBATCH --partition=gpu\n" in text and "#SBATCH --cpus-per-task=2\n" in text
    assert text.endswith(f"-m slora_dist study {path} --out 'a b' --cell \"$SLURM_ARRAY_TASK_ID\"\n")


def test_an_array_job_asks_for_the_threads_of_its_ranks_and_for_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["study", str(write(tmp_path, ranks=2, set=SMALL | {"run.threads": 3, "run.device": "cuda"})), "--slurm", "--dry-run"]
    assert main(asked) == 2 and "error: run.device: cuda, but the batch file asks for no GPU" in capsys.readouterr().err
    assert main([*asked, "--gpus-per-node", "1"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=6\n" in text and "#SBATCH --gpus-per-node=1\n" in text


@pytest.mark.parametrize(
    ("entries", "setting"),
    [
        ({"ranks": 5}, "set: clients.per_round"),
        ({"axes": {"links": {"slow": {"network.mode": "sleep"}}}}, "links.slow: network.mode"),
    ],
)
def test_what_its_ranks_cannot_play_is_refused_before_any_run(tmp_path: Path, entries: dict[str, Any], setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grid.read(write(tmp_path, **entries))
    assert caught.value.setting == setting


# ---- tables


def fake(folder: Path, config: dict[str, Any], phases: list[tuple[str, int, float]], message: int, scores: list[float]) -> None:
    """Write a finished run: (name, rounds, seconds of local training) of its phases; every client's message has ``message`` bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": config, "world": {"size": 2, "transport": "gloo"}}))
    rounds = [(name, seconds) for name, count, seconds in phases for _ in range(count)]
    clients = config["clients"]["per_round"]
    metrics, ledger = [], []
    for number, ((name, seconds), score) in enumerate(zip(rounds, scores, strict=True), 1):
        here = clients - number % 2  # in every other round one is away
        spent, payload = {"train": seconds * here, "evaluate": 0.0, "total": 1.0}, {"up": message * here, "down": message * here}
        record = {"round": number, "phase": name, "accuracy": score, "clients": list(range(here)), "seconds": spent}
        metrics.append(record | {"payload_bytes": payload})
        for direction in ("up", "down"):
            line = {"rank": 1, "round": number, "direction": direction, "clients": clients, "payload_bytes": message * clients}
            ledger += [line, line | {"rank": 0, "clients": 0, "payload_bytes": 0}, line | {"direction": "control"}]
    switch = {"accuracy_before": 0.4, "accuracy_after": 0.3} if len(phases) > 1 else None
    timeline = (
        [  # half a minute, and half a minute more in which rank 0 judged the model twice
            {"rank": 0, "round": 2, "what": "switch", "began": 100.0, "seconds": 60.0},
            {"rank": 0, "round": 2, "what": "evaluate", "began": 100.0, "seconds": 10.0},
            {"rank": 0, "round": 2, "what": "evaluate", "began": 130.0, "seconds": 20.0},
            {"rank": 1, "round": 2, "what": "switch", "began": 100.0, "seconds": 1.0},
        ]
        if switch
        else []
    )
    for name, lines in (("metrics", metrics), ("ledger", ledger), ("timeline", timeline), ("counters", [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"accuracy": scores[-1], "switch": switch, "seconds": {"total": 2.0}}))


def test_figures_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    study = grid.read(write(tmp_path, seeds=[0, 1, 2, 3, 4], splits={"even": {}}, targets=[0.5, 0.9], mbit=[8]))
    ends = [0.50, 0.52, 0.54, 0.56, 0.58]
    for cell in study.cells:
        settings, end = cell.config.model_dump(), ends[cell.seed]
        if cell.labels["method"] == "fft":
            fake(tmp_path / cell.name, settings, [("dense", 4, 3.0)], 30_000_000, [0.2, 0.6, 0.7, end + 0.2])
        else:
            fake(tmp_path / cell.name, settings, [("sparse", 1, 12.0), ("lowrank", 3, 6.0)], 3_000_000, [0.4, 0.3, 0.55, end])
    found = tables.rows(study, tmp_path)
    tables.write(study, tmp_path, found)
    with (tmp_path / "tables.csv").open(newline="") as file:
        fft, slora = csv.DictReader(file)
    assert (slora["method"], slora["seeds"], slora["rounds"], slora["seconds_per_round"]) == ("slora", "5", "1 3", "12 6")
    told = {
        key: float(value)
        for key, value in slora.items()
        if key not in ("split", "method", "trainable", "rounds", "seconds_per_round") and value
    }
    minutes = (24 + 30 + 30) / 60  # 24 MB at 1 MB/s; 12 + 3 x 6 s of training; the switch on the server
    assert told == pytest.approx(
        {
            "seeds": 5,
            "accuracy": 0.54,
            "accuracy_std": statistics.stdev(ends),
            "accuracy_best": 0.56,
            "gbit": 24e6 * 8 / 2**30,
            "mbyte": 24,
            "switch_seconds": 30,
            "bytes_of_fft": 0.1,
            "before_switch": 0.4,
            "after_switch": 0.3,
            "minutes_8_mbit": minutes,
            "minutes_8_mbit_of_fft": minutes / ((240 + 12) / 60),
            "rounds_to_0.5": 3,
            "gbit_to_0.5": 18e6 * 8 / 2**30,
            "minutes_8_mbit_to_0.5": (18 + 24 + 30) / 60,
        }
    )
    assert fft["rounds_to_0.5"] == "2" and fft["rounds_to_0.9"] == "" and fft["before_switch"] == "" and fft["bytes_of_fft"] == "1.0"
    text = (tmp_path / "tables.md").read_text()
    assert "10 of 10 runs are finished" in text and "54.00 % +- 3.16 | 56.00 % | 40.00 % to 30.00 % | 0.179 | 24.0 | 10.00 %" in text
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 8
    charts.write(study, tmp_path / "one", found)
    charts.write(study, tmp_path / "two", found)
    assert (tmp_path / "one/gap_to_fft.svg").read_bytes() == (tmp_path / "two/gap_to_fft.svg").read_bytes()


def test_trainable_parameters_and_bytes_are_the_plans(tiny_run: RunFolder) -> None:
    """One client's bytes are read from the ledger of a real run: two messages a round, of the phase's size."""
    row = tables.Row({}, tiny_run.config(), [load(tiny_run.path)], (5.0,))
    sparse, lowrank = row.trainable
    spent = [point.client for point in points(row.runs[0])]
    assert spent[3] == 4 * 2 * 4 * sparse and spent[7] == 4 * 2 * 4 * (sparse + lowrank)


UNLIKE = {  # runs in whose rounds clients that have been there get other messages than new ones, or of their own rank
    "ffa": ("method.lowrank.rule=ffa",),
    "rolora": ("method.lowrank.rule=rolora",),
    "keep": ("clients.keep=[head]",),
    "ranks": ("method.lowrank.client_ranks=[2,4]",),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_the_bytes_of_one_client_do_not_depend_on_who_is_drawn(name: str, tmp_path: Path) -> None:
    """Where all take part in every round, and have one rank, each has its share of the bytes; where half do, one that does has the same."""
    rounds = (*SHORT, "method.sparse.rounds=1", "method.lowrank.rounds=4", "clients.steps=1")
    alike = () if name == "ranks" else UNLIKE[name]
    every, half = run(tmp_path / "every", *rounds, *alike, "clients.per_round=6"), run(tmp_path / "half", *rounds, *UNLIKE[name])
    payload = every.summary()["payload_bytes"]
    found = points(load(half.path))
    assert found[-1].client == (payload["up"] + payload["down"]) / 6


def test_without_a_finished_run_there_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of the study is finished"):
        tables.rows(grid.read(write(tmp_path)), tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for more in ([], ["--cell", "0"], ["--tables-only"]):
        assert main(["study", str(write(tmp_path)), "--out", str(tmp_path / "file" / "out"), *more]) == 2
        said = capsys.readouterr().err
        assert "error: --out: " in said and said.count("\n") == 1
