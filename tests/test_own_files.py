"""Each client its own file, which no rank opens but the one that answers for the client."""

import json
import os
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from slora_dist.comm.torch_comm import TorchComm
from slora_dist.data.toy import toy
from slora_dist.job import Job
from slora_dist.roundplan import home
from slora_dist.runfolder import RunFolder
from tests.ranks import run_ranks
from tests.tiny import run, same, tiny

SIZE, CLIENTS, SECONDS = 3, 4, 120.0


def settings(tokenizer: Path) -> tuple[str, ...]:
    return (
        "data.path=client_{client}.jsonl", "data.test_path=held_out.jsonl", "data.labels=[animals, cooking, music, weather]",
        "data.partition=iid", f"model.tokenizer={tokenizer}", f"clients.count={CLIENTS}", "clients.per_round=3", "clients.epochs=1",
        "method.sparse.rounds=2", "method.lowrank.rounds=1",
    )  # fmt: skip


def deal(folder: Path, name: str, start: int) -> None:
    """Write a client's documents, or those held out."""
    columns = toy()["train"]
    rows = [{"text": columns["text"][at], "label": columns["label"][at]} for at in range(start, start + 20)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def play(rank: int, size: int, folder: str, overrides: tuple[str, ...]) -> list[str]:
    """Play a rank whose working folder has nothing but what it may read; return what lies there."""
    place = Path(folder) / f"rank-{rank}"
    os.chdir(place)
    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS)
    Job(tiny(*overrides), comm, Path(folder) / "many", torch.device("cpu")).run(False, None)
    comm.close()
    return sorted(path.name for path in place.iterdir())


def test_a_rank_needs_no_file_but_those_of_its_clients(tiny_run: RunFolder, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    overrides = settings(tiny_run.adapter)
    places = {rank: tmp_path / f"rank-{rank}" for rank in range(SIZE)} | {-1: tmp_path / "alone"}
    for place in places.values():
        place.mkdir()
    for client in range(CLIENTS):
        for owner in (home(client, SIZE), -1):
            deal(places[owner], f"client_{client}.jsonl", 40 * client)
    for owner in (0, -1):
        deal(places[owner], "held_out.jsonl", 200)
    lay = run_ranks(SIZE, play, str(tmp_path), overrides, seconds=SECONDS)
    assert lay == [["held_out.jsonl"], ["client_0.jsonl", "client_2.jsonl"], ["client_1.jsonl", "client_3.jsonl"]]
    monkeypatch.chdir(places[-1])
    alone = run(tmp_path / "one", *overrides)
    assert same(alone, RunFolder(tmp_path / "many"))
