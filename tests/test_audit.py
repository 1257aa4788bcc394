"""An audit finds nothing on real runs, and names what was dropped, doubled or altered, for every kind of line."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slora_dist.audit import kernel, lines, sums
from slora_dist.audit.checks import CHECKS, audit
from slora_dist.audit.expected import key
from slora_dist.audit.run import Run
from slora_dist.cli import main
from slora_dist.runfolder import RunFolder
from tests.ranks import run_ranks
from tests.tiny import SHORT, run

SIZE, SECONDS = 2, 120.0
KEEP = ("method.lowrank.residual=keep", "method.lowrank.remainder=keep")
TOGETHER = {
    "gather": (),
    "keep": KEEP,
    "spread": ("server.svd=ranks",),
    "gradient": ("method.name=sft", "method.sparse.mask=gradient"),
    "held out": ("clients.holdout=0.2", "clients.eval_every=1", "server.evaluate=overlap"),
    "reduce": ("comm.collective=reduce",),
    "topk": ("comm.wire.topk=0.1", "comm.wire.indices=gap"),
    "exact": ("comm.sum=exact", "server.weighting=examples"),
    "secure": ("comm.sum=exact", "comm.secure=true", "comm.sum_bits=64", "comm.collective=reduce"),
    "auto": ("comm.collective=auto", "clients.count=7"),
}
NAMES = ("alone", *TOGETHER, "resumed", "moved", "mask moved")  # moved: begun by one rank, ended by two
LEDGER = (lines.arithmetic, lines.protocol, lines.gathers, sums.plan, sums.records)


def play(rank: int, size: int, folder: str) -> None:
    """Play all runs of two ranks, and the end of one that was begun by one rank."""
    from torch._C._distributed_c10d import FileStore

    from slora_dist.comm.torch_comm import TorchComm

    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS)
    for name, overrides in TOGETHER.items():
        run(Path(folder) / name, *SHORT, *overrides, comm=comm)
    for name in ("moved", "mask moved"):
        run(Path(folder) / name, resume=True, comm=comm)
    comm.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("audited")
    run(folder / "alone", *SHORT)
    run(folder / "moved", *SHORT, *KEEP, stop_after=3)
    run(folder / "mask moved", *SHORT, *TOGETHER["gradient"], stop_after=1)
    run(folder / "resumed", *SHORT, stop_after=1)
    run(folder / "resumed", resume=True, stop_after=2)  # the next life begins where the first phase ends
    run(folder / "resumed", resume=True)
    run_ranks(SIZE, play, str(folder), seconds=SECONDS)
    return {name: Run(RunFolder(folder / name)) for name in NAMES}


def faults(audited: Run) -> list[str]:
    return [fault for check in CHECKS.values() for fault in check(audited) or ()]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_with_real_runs(name: str, runs: dict[str, Run]) -> None:
    assert faults(runs[name]) == []
    assert [life.size for life in runs[name].lives] == {"alone": [1], "resumed": [1, 1, 1], "moved": [1, 2], "mask moved": [1, 2]}.get(
        name, [2]
    )
    assert (kernel.sockets(runs[name]) is not None) == any(life.size > 1 for life in runs[name].lives)


def test_what_another_transport_moved_is_not_looked_for_in_sockets(runs: dict[str, Run]) -> None:
    """Begun over gloo and ended over MPI, which may share memory: the sockets of the first life alone are held against the ledger."""
    resumed = copy.copy(runs["moved"])
    resumed.metrics = [line | {"transport": "gloo" if line["round"] <= 3 else "mpi"} for line in resumed.metrics]
    resumed.counters = [line | {"tcp": dict.fromkeys(line["tcp"], 0)} for line in resumed.counters]
    assert [resumed.transport(life) for life in resumed.lives] == ["gloo", "mpi"]
    assert kernel.sockets(resumed) is None


def changed(line: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (what was done, the lines that stand in the place of ``line``)."""
    yield "dropped", []
    yield "doubled", [line, line]
    for field in ("payload_bytes", "transport_bytes", "clients", "round"):
        yield field, [line | {field: line[field] + 1}]
    yield "rank", [line | {"rank": 1 - line["rank"]}]
    for field, other in (
        ("phase", "other"),
        ("kind", "other"),
        ("op", "other"),
        ("direction", "down" if line["direction"] == "up" else "up"),
    ):
        yield field, [line | {field: other}]
    for kind, nbytes in line["bytes_by_kind"].items():
        rest = {other: count for other, count in line["bytes_by_kind"].items() if other != kind}
        yield f"bytes of {kind}", [line | {"bytes_by_kind": rest | {kind: nbytes + 1}}]
        yield f"kind {kind}", [line | {"bytes_by_kind": rest | {"other": nbytes}, "kind": line["kind"].replace(kind, "other")}]


@pytest.mark.parametrize("name", NAMES)
def test_every_change_to_every_kind_of_line_is_named(name: str, runs: dict[str, Run]) -> None:
    """The fault that is told names round, rank and operation of the line, or what the line has become."""
    audited, seen, unnamed = copy.copy(runs[name]), set(), []
    ledger, ends = audited.ledger, {life.last for life in audited.lives}
    for at, line in enumerate(ledger):
        where = f"round {line['round']}, rank {line['rank']}: {line['op']}"
        which = (line["round"] in (0, audited.lives[-1].first), *key(line)[1:])
        if which in seen or (line["kind"] == "ledger" and line["round"] in ends):
            continue
        seen.add(which)
        for change, instead in changed(line):
            audited.ledger = [*ledger[:at], *instead, *ledger[at + 1 :]]
            audited.lives = audited.protocol.lives(audited.ledger, audited.done, {})
            told = [fault for check in LEDGER for fault in check(audited)]
            if not any(where in fault for fault in told) and not (instead and any(lines.where(instead[-1]) in fault for fault in told)):
                unnamed.append((change, lines.where(line), told[:3]))
    assert not unnamed and len(seen) >= 10


def test_an_unfinished_run_is_audited_as_far_as_it_got(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *SHORT, stop_after=3)
    folder.append("ledger", [folder.lines("ledger")[-1] | {"round": 4}])  # what a death before the round's record leaves
    checks = audit(folder)
    assert all(not check.faults for check in checks)
    assert [check.faults for check in checks if check.name.startswith("summary")] == [None]


def test_the_command_says_what_is_wrong_and_fails(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs["gather"].folder.path, tmp_path / "run")
    assert main(["audit", str(tmp_path / "run")]) == 0
    assert "WRONG" not in capsys.readouterr().out
    path = tmp_path / "run" / "ledger.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gone = next(at for at, row in enumerate(rows) if (row["rank"], row["op"], row["direction"], row["round"]) == (1, "gather", "up", 2))
    path.write_text("".join(json.dumps(row) + "\n" for at, row in enumerate(rows) if at != gone))
    assert main(["audit", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().out
    assert "      ledger.jsonl: round 2, rank 1: gather up value+head of phase sparse: 0 lines, 1 should be there\n" in told
    assert "WRONG summary" in told and "summary.json: payload_bytes.up " in told
    assert main(["audit", str(tmp_path / "nowhere")]) == 2


def test_records_and_summary_are_held_to_the_ledger(runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["alone"].folder.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    metrics, summary = folder.lines("metrics"), folder.summary()

    def told(records: list[dict[str, Any]], **figures: Any) -> str:
        (folder.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        folder.write_summary(summary | figures)
        return "\n".join(faults(Run(folder)))

    assert told(metrics) == ""
    assert "round 1: clients [9, 1, 1]" in told([metrics[0] | {"clients": [9, 1, 1]}, *metrics[1:]])
    assert "round 1: payload_bytes {'up': 1, 'down': 2}" in told([metrics[0] | {"payload_bytes": {"up": 1, "down": 2}}, *metrics[1:]])
    assert "rounds [1, 2, 4]" in told([metrics[0], metrics[1], metrics[3]])
    assert "summary.json: accuracy 0.99" in told(metrics, accuracy=0.99)
    assert "summary.json: switch.accuracy_before -1" in told(metrics, switch=summary["switch"] | {"accuracy_before": -1})
    dead = [metrics[0] | {"missing": {"ranks": [3], "clients": []}}, *metrics[1:]]
    assert "summary.json: lost does not tell of ranks [3]" in told(dead)
    assert "lost does not tell" not in told(dead, lost=[{"rank": 3, "round": 1, "clients": [], "reason": "gone"}])
    assert "summary.json: more 1, the other files give None" in told(metrics, more=1)


def test_the_kernel_bounds_the_ledger_from_both_sides(runs: dict[str, Run]) -> None:
    def told(rank: int, factor: float) -> str:
        audited = copy.copy(runs["gather"])
        audited.counters = copy.deepcopy(audited.counters)
        for row in audited.counters:
            if row["rank"] == rank:
                row["tcp"] = {name: int(factor * count) for name, count in row["tcp"].items()}
        return "\n".join(kernel.sockets(audited) or ())

    assert told(0, 1.0) == told(1, 1.0) == ""
    assert "rank 0: sockets received" in told(0, 0.5) and "rank 1: sockets sent" in told(1, 0.5)
    assert "bytes in all, the ledger with framing allows" in told(0, 10.0)


def test_interfaces_of_hosts_are_held_to_the_ledger(runs: dict[str, Run]) -> None:
    """Two hosts, as their interfaces would tell it: what the sockets moved, with the headers of frames."""
    audited = copy.copy(runs["gather"])
    assert kernel.interfaces(audited) is None
    audited.counters = [
        row | {"interfaces": {"lo": {}, "eth0": {"rx_bytes": 2 * row["tcp"]["received_bytes"], "tx_bytes": 2 * row["tcp"]["sent_bytes"]}}}
        for row in audited.counters
    ]
    assert list(kernel.interfaces(audited) or ["none"]) == []
    for row in audited.counters:
        row["interfaces"]["eth0"]["rx_bytes"] //= 8
    assert any("rank 0: interfaces have rx_bytes" in fault for fault in kernel.interfaces(audited) or ())
