"""What ``slora-dist partition`` says and draws."""

import json
from pathlib import Path

import numpy as np
import pytest

from slora_dist.cli import main
from slora_dist.data.federation import Federation
from slora_dist.data.overview import Overview, overview
from tests.tiny import TINY, run, tiny


def counted(*rows: list[int]) -> Overview:
    return Overview([str(at) for at in range(len(rows[0]))], np.array(rows))


def test_skew_is_nothing_where_all_are_alike_and_known_where_they_are_not() -> None:
    alike = counted([2, 4], [2, 4]).figures()
    assert alike["label_skew"] == alike["size_skew"] == 0
    apart = counted([6, 0, 0], [0, 6, 0], [0, 0, 6]).figures()
    assert apart["label_skew"] == pytest.approx(2 / 3) and apart["labels_per_client"] == {"min": 1, "median": 1, "max": 1}
    uneven = counted([1, 2], [3, 6]).figures()
    assert uneven["label_skew"] == pytest.approx(0) and uneven["size_skew"] == pytest.approx(0.5)
    assert uneven["documents"] == {"total": 12, "min": 3, "median": 6, "max": 9}


def test_it_is_the_split_that_training_sees() -> None:
    config = tiny()
    found, federation = overview(config), Federation(config, None)
    assert found.counts_KC.sum(1).tolist() == federation.sizes and found.names == federation.names
    for client, counts_C in enumerate(found.counts_KC):
        assert np.bincount(federation.client(client).labels_N, minlength=4).tolist() == counts_C.tolist()


def test_clients_with_files_of_their_own_are_read(tmp_path: Path) -> None:
    for client, labels in enumerate([[0, 0, 1], [1]]):
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    own = (f"data.path={tmp_path}/{{client}}.jsonl", f"data.test_path={tmp_path}/0.jsonl", "data.labels=2", "data.partition=iid")
    assert overview(tiny(*own, "clients.count=2", "clients.per_round=2")).counts_KC.tolist() == [[2, 1], [0, 1]]


@pytest.mark.parametrize(("clients", "suffix"), [(4, "png"), (60, "svg"), (4, "pdf")])
def test_the_command_prints_and_draws(clients: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / f"split.{suffix}"
    arguments = ["partition", str(TINY), f"clients.count={clients}", "data.partition=quantity", "--plot", str(picture)]
    assert main(arguments) == 0
    assert f"quantity 1, {clients} clients" in capsys.readouterr().out
    drawn = picture.read_bytes()
    assert len(drawn) > 5000
    assert main([*arguments, "--json"]) == 0 and (suffix == "pdf" or picture.read_bytes() == drawn)
    told = json.loads(capsys.readouterr().out)
    assert told["clients"] == clients and sum(map(sum, told["counts"].values())) == told["documents"]["total"] == 240


@pytest.mark.parametrize("name", ["split.txt", "nowhere/split.png"])
def test_a_picture_that_cannot_be_written_is_said_first(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["partition", str(TINY), "--plot", str(tmp_path / name)]) == 2
    assert "--plot" in capsys.readouterr().err


def test_centralized_training_is_a_run_with_one_client(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "run", "clients.count=1", "clients.per_round=1", "method.name=fft", "method.dense.rounds=3", "method.dense.lr=3e-3"
    )
    metrics = folder.lines("metrics")
    assert [line["num_examples"] for line in metrics] == [240] * 3 and metrics[-1]["accuracy"] > 0.9
