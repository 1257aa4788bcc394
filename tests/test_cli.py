"""What a user types wrongly, and what the program answers: one line that names the setting, exit code 2, before any training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slora_dist.cli import main
from slora_dist.errors import ConfigError
from slora_dist.runfolder import RunFolder
from tests.tiny import ROOT, TINY

ROWS = [{"text": f"word{row % 7} and word{row % 3}", "label": row % 3} for row in range(30)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files with a mistake each."""
    folder = tmp_path_factory.mktemp("files")
    contents = {
        "good": ROWS,
        "outside": [*ROWS, {"text": "another", "label": 3}],
        "blank": [*ROWS, {"text": " ", "label": 1}],
        "client_0": ROWS[:9],
        "client_1": [],
    }
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "noise.parquet").write_bytes(b"\x00\x01\x02 this is no parquet file")
    return folder


FILE = ["data.path={files}/good.jsonl", "data.test_path={files}/good.jsonl"]
OWN = [
    "data.path={files}/client_{client}.jsonl",
    "data.partition=iid",
    "data.test_path={files}/good.jsonl",
    "data.labels=3",
    "clients.count=2",
    "clients.per_round=2",
]
BAD = {
    "unknown key": (["method.sparse.desnity=0.1"], "method.sparse.desnity", "density"),
    "wrong type": (["clients.epochs=many"], "clients.epochs", "integer"),
    "density 0": (["method.sparse.density=0"], "method.sparse.density", "above 0 and up to 1"),
    "density 2": (["method.sparse.density=2"], "method.sparse.density", "above 0 and up to 1"),
    "rank above the matrix": (["method.lowrank.rank=65"], "method.lowrank.rank", "1 to 64"),
    "a rank above its matrix": (["method.lowrank.ranks={pooler.dense: 65}"], "method.lowrank.ranks", "1 to 64"),
    "missing column": ([*FILE, "data.text=body"], "data.text", "text, label"),
    "empty client": (["data.alpha=1e-3", "clients.count=100", "clients.per_round=3"], "data.partition", "fewer clients"),
    "label outside the range": ([*FILE, "data.path={files}/outside.jsonl", "data.labels=3"], "data.label", "0 to 2"),
    "more sampled than clients": (["clients.per_round=7"], "clients.per_round", "1 to clients.count = 6"),
    "unreadable file": (["data.path={files}/noise.parquet", "data.test_path={files}/good.jsonl"], "data.path", ".parquet"),
    "missing file": (["data.path={files}/nowhere.csv", "data.test_path={files}/good.jsonl"], "data.path", ""),
    "missing held-out file": ([*FILE, "data.test_path={files}/nowhere.csv"], "data.test_path", ""),
    "nothing held out": (["data.path={files}/good.jsonl"], "data.test_path", ""),
    "empty document": ([*FILE, "data.path={files}/blank.jsonl"], "data.text", "a text in every row"),
    "no module of that name": (["method.lowrank.targets=[qeury]"], "method.lowrank.targets", "query"),
    "no head of that name": (["model.head=[head]"], "model.head", "classifier"),
    "no model of that type": (["model.config.model_type=brt"], "model.config", "model_type"),
    "longer than the model": (["data.max_length=65"], "data.max_length", "2 to 64"),
    "CUDA that is not there": (["run.device=cuda"], "run.device", "cpu"),
    "own files without tokenizer": (OWN, "model.tokenizer", "tokenizer folder"),
}


@pytest.fixture(autouse=True)
def stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run that breaks fail its test instead of ending pytest's process."""

    def leave(code: int) -> None:
        raise AssertionError(f"the program broke with exit code {code}")

    monkeypatch.setattr("slora_dist.comm.alone.leave", leave)


def answer(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit code, what stands on stderr)."""
    capfd.readouterr()
    code = main(arguments)
    return code, capfd.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_one_message_before_any_training(name: str, files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides, setting, allowed = BAD[name]
    if name.startswith("CUDA") and __import__("torch").cuda.is_available():
        pytest.skip("there is one")
    given = [override.replace("{files}", str(files)) for override in overrides]
    code, said = answer(capfd, "train", str(TINY), *given, "--out", str(tmp_path / "run"))
    assert code == 2
    assert said.count("\n") == 1 and f"error: {setting}: " in said, said
    assert allowed in said.partition("Allowed: ")[2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_empty_file_of_one_client_is_named(files: Path, tiny_run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = [override.replace("{files}", str(files)) for override in OWN]
    code, said = answer(capfd, "train", str(TINY), *given, f"model.tokenizer={tiny_run.adapter}", "--out", str(tmp_path / "run"))
    assert code == 2 and "error: data.path: " in said and "client_1" in said and said.count("\n") == 1


@pytest.mark.parametrize("change", ["run.seed=1", "method.lowrank.rank=5", "model.config.hidden_dropout_prob=0.5"])
def test_a_run_is_not_resumed_with_another_config(change: str, tiny_run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    for given in ([change], [str(TINY), change]):
        code, said = answer(capfd, "train", *given, "--resume", str(tiny_run.path))
        assert code == 2 and f"error: {change.partition('=')[0]}: " in said and said.count("\n") == 1, said


def test_a_run_goes_on_in_its_own_folder(tiny_run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = answer(capfd, "train", "--resume", str(tiny_run.path), "--out", str(tmp_path / "other"))
    assert code == 2 and "error: --out: " in said and said.count("\n") == 1 and not (tmp_path / "other").exists()


def test_a_run_is_never_overwritten(tiny_run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    before = tiny_run.path.joinpath("summary.json").read_bytes()
    code, said = answer(capfd, "train", str(TINY), "--out", str(tiny_run.path))
    assert code == 2 and "error: --out: " in said and "--resume" in said
    assert tiny_run.path.joinpath("summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["train"], "CONFIG.yaml"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", "nowhere"], "nowhere/config.json"),
        (["plan", "nowhere.yaml"], "nowhere.yaml"),
        (["export", "nowhere", "dest"], "nowhere/config.json"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], setting: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = answer(capfd, *arguments)
    assert code == 2 and f"error: {setting}: " in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "agreed", "speaks"),
    [
        ({"RANK": "0"}, True, True),
        ({"RANK": "1"}, False, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False, False),
        ({"RANK": "1"}, True, False),
    ],
)
def test_an_error_is_said_once_on_every_machine_that_may_have_it_alone(
    variables: dict[str, str], agreed: bool, speaks: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A config that only one machine lacks: rank 0 waits for a rank that never comes, and cannot say why."""
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)

    def refuse(*_: object) -> None:
        error = ConfigError("nowhere.yaml", "cannot be read", "a readable YAML file")
        error.agreed = agreed
        raise error

    monkeypatch.setattr("slora_dist.settings.load", refuse)
    code, said = answer(capfd, "train", "nowhere.yaml")
    assert code == 2
    assert said == (f"slora-dist [rank {variables['RANK']}] error: nowhere.yaml: cannot be read. Allowed: a readable YAML file.\n" * speaks)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["plan", str(TINY), "--mbit", "0"], "--mbit"),
        (["doctor", str(TINY), "--out", "nowhere/m.json"], "--out"),
        (["doctor", str(TINY), "--out", "."], "--out"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(
    arguments: list[str], setting: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slora_dist.doctor.examine", None)  # nothing is measured by then
    code, said = answer(capfd, *arguments)
    assert code == 2 and f"error: {setting}: " in said and said.count("\n") == 1


def test_what_was_measured_is_printed_though_its_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slora_dist.doctor.examine", lambda *_: (tmp_path / "m.json").mkdir() or {"found": 1})
    assert main(["doctor", "--json", "--out", str(tmp_path / "m.json")]) == 2
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"found": 1} and "error: --out: " in captured.err


def test_an_unknown_command_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2 and "train" in capfd.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "one"])
def test_a_run_stops_after_a_round_that_there_is(number: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(TINY), "--out", str(tmp_path / "run"), "--stop-after", number])
    assert ended.value.code == 2 and f"--stop-after: '{number}' is no number from 1" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_plan_prints_json_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--json", "--mbit", "8"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert {"payload_bytes", "full_finetuning_payload_bytes", "phases"} <= plan.keys()
    client = sum(sum(plan["payload_bytes"][way] for way in ("up", "down")) for _ in (0,)) / plan["clients"]["per_round"]
    assert plan["minutes"]["8"] == pytest.approx(client / 1e6 / 60)


@pytest.mark.launcher
def test_silent_on_a_pipe(tmp_path: Path) -> None:
    """The program as a user starts it, once: no progress, no warnings, no control characters, tables in ASCII-wide lines."""
    short = ["method.sparse.rounds=1", "method.lowrank.rounds=1", "clients.epochs=1"]
    command = [sys.executable, "-m", "slora_dist", "train", str(TINY), *short, "--out", str(tmp_path / "run")]
    environ = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    played = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert played.returncode == 0, played.stderr
    assert played.stderr == ""
    assert not set("\x1b\r") & set(played.stdout)
    assert "test accuracy" in played.stdout and str(tmp_path / "run" / "adapter") in played.stdout


def test_overrides_may_stand_behind_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(TINY), "--out", str(tmp_path / "run"), "method.sparse.density=7"]) == 2
    assert "method.sparse.density: 7 does not fit" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(TINY), "--out", str(tmp_path / "run"), "--densty=7"])
    assert "unrecognized arguments: --densty=7" in capfd.readouterr().err
