"""Nobody takes part who does not hold the job's secret or does not mean the same run: over gloo, and under torchrun and mpiexec."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch._C._distributed_c10d import FileStore

import slora_dist
from slora_dist import admission
from slora_dist.admission import NONCE_BYTES, PROOF_BYTES, account, admit, judge
from slora_dist.comm.alone import Alone
from slora_dist.comm.base import Chunk, Transport
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.errors import ConfigError
from slora_dist.runfolder import RunFolder
from slora_dist.secret import proof
from tests.ranks import run_ranks
from tests.tiny import ROOT, TINY, run, tensors, tiny

SECRET = "correct horse battery staple"
HELD = {"SLORA_DIST_SECRET": SECRET}


def told(comm: Transport, environ: dict[str, str], overrides: list[str]) -> Any:
    """Return the session's key and what this rank noted, or the refusal."""
    try:
        admitted = admit(comm, tiny(*overrides), environ)
        return admitted.session, [(entry.op, entry.label.by_kind, entry.transport_bytes) for entry in admitted.ledger.entries]
    except ConfigError as error:
        return str(error)


class Threads(Alone):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: dict[int, Tensor]) -> None:
        super().__init__()
        self.rank, self.size, self.meeting, self.table = rank, size, meeting, table

    def broadcast(self, wire_B: Tensor) -> None:
        if self.rank == 0:
            self.table[0] = wire_B.clone()
        self.meeting.wait(30)
        wire_B.copy_(self.table[0])
        self.meeting.wait(30)

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        (self.table[self.rank],) = messages
        self.meeting.wait(30)
        found = [(rank, 0, self.table[rank]) for rank in senders if self.rank == 0]
        self.meeting.wait(30)
        return iter(found)


def answers(environs: list[dict[str, str]], overrides: list[list[str]] | None = None) -> list[Any]:
    """Return what every rank was told."""
    size, table = len(environs), dict[int, Tensor]()
    meeting = threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [Threads(rank, size, meeting, table) for rank in range(size)]
        return list(pool.map(told, ranks, environs, overrides or [[]] * size))


def _gloo(rank: int, size: int, folder: str, environ: dict[str, str]) -> Any:
    comm = TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), 40.0)
    found = told(comm, environ, [])
    comm.close()
    return found


def test_ranks_that_agree_are_admitted_with_one_key(tmp_path: Path) -> None:
    ranks = run_ranks(3, _gloo, str(tmp_path), HELD)
    verdict = admission.VERDICT_BYTES + 3 * NONCE_BYTES
    wanted = [
        ("broadcast", {"challenge": 32}, 32),
        ("gather", {"answer": admission.ANSWER_BYTES}, admission.ANSWER_BYTES),
        ("broadcast", {"verdict": verdict}, verdict),
    ]
    assert ranks[1][1] == ranks[2][1] == wanted
    assert ranks[0][1] == [wanted[0], (*wanted[1][:2], 2 * admission.ANSWER_BYTES), wanted[2]]
    assert len({key for key, _ in ranks}) == 1 and len(ranks[0][0]) == 32
    assert answers([HELD] * 3)[0][0] != ranks[0][0], "the key is that of one start alone"
    assert len({key for key, _ in answers([{}] * 3)}) == 1


OTHER = {"SLORA_DIST_SECRET": "x" * 20}
CASES: dict[str, tuple[list[dict[str, str]], list[str], str, str]] = {  # environments, rank 2's overrides, what rank 0 and rank 2 say
    "no secret": ([HELD, HELD, {}], [], "SECRET: rank 2 does not hold the secret of rank 0", "and this rank finds none"),
    "another": ([HELD, HELD, OTHER], [], "rank 2 does not hold the secret of rank 0", "rank 0 does not hold the secret of this rank"),
    "rank 0 lacks it": ([{}, {}, HELD], [], "rank 2 holds a secret, or garbles it, and rank 0", "rank 0 does not hold the secret"),
    "a bad file": ([HELD, HELD, {"SLORA_DIST_SECRET_FILE": "/"}], [], "rank 2 does not hold the secret", "SECRET_FILE: / cannot be read"),
    "a bad file alone": ([{}, {}, {"SLORA_DIST_SECRET_FILE": "/"}], [], "SECRET_FILE: on rank 2: / cannot be", "on rank 2: / cannot be"),
    "other settings": (
        [HELD] * 3, ["model.config.hidden_size=128"], "model.config.hidden_size: rank 2 has 128, rank 0 has 64. Allowed: ", "has 128"
    ),
    "a long setting": ([HELD] * 3, [f"data.text={'x' * 9000}"], "data.text: rank 2 has 'xxx", "data.text: "),
    "beyond all measure": ([HELD] * 3, [f"data.text={'x' * 90000}"], "on rank 2: its settings are too long", "too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_that_differs_is_refused_everywhere(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    environs, overrides, root, refused = CASES[name]
    ranks = answers(environs, [[], [], overrides])
    assert all(isinstance(error, str) for error in ranks), "a rank went on"
    assert root in ranks[0] and refused in ranks[2] and len(ranks[0]) < 700
    said = capfd.readouterr().err.splitlines()
    assert f"slora-dist [rank 2] error: {ranks[2]}" in said and not any("[rank 0]" in line for line in said)


def test_a_refusal_of_any_length_is_told() -> None:
    ranks = answers([HELD] * 2, [[f"data.text={letter * 300}"] for letter in "\N{GRINNING FACE}\N{PILE OF POO}"])
    assert ranks[0] == ranks[1] == "slora_dist: rank 1 is refused, for more than can be told here. Allowed: the same on every rank."


def test_a_newcomer_is_judged_as_the_others_were() -> None:
    assert judge(tiny(), 3, account(tiny())) is None
    refused = judge(tiny(), 3, account(tiny("model.config.hidden_size=128")))
    assert str(refused).startswith("model.config.hidden_size: rank 3 has 128, rank 0 has 64. ")
    assert "its settings are too long" in str(judge(tiny(), 3, account(tiny(f"data.text={'x' * 90000}"))))


def test_one_may_be_required() -> None:
    for error in answers([{}] * 2, [["comm.secret=required"]] * 2):
        assert error.startswith("comm.secret: required, and this rank finds none. Allowed: the launcher's SLORA_DIST_SECRET")


class Between(Alone):
    """Rank 0 and a network that changes what it carries."""

    def __init__(self, at: int, place: int) -> None:
        super().__init__()
        self.at, self.place, self.carried = at, place, 0

    def broadcast(self, wire_B: Tensor) -> None:
        self._carry(wire_B)

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        (message_B,) = messages
        self._carry(message_B)
        return super().gather([message_B], senders, nbytes)

    def _carry(self, wire_B: Tensor) -> None:
        if self.carried == self.at:
            wire_B[self.place] ^= 1
        self.carried += 1


@pytest.mark.parametrize("environ", [HELD, {}], ids=["secret", "none"])
@pytest.mark.parametrize(("at", "place"), [(1, 0), (1, PROOF_BYTES), (1, 70), (1, -1), (2, 0), (2, PROOF_BYTES), (2, 100), (2, -1)])
def test_a_message_that_was_changed_is_refused(environ: dict[str, str], at: int, place: int) -> None:
    with pytest.raises(ConfigError, match="SLORA_DIST_SECRET"):
        admit(Between(at, place), tiny(), environ)
    assert admit(Between(9, 0), tiny(), environ).session


def test_an_answer_proves_its_rank_and_its_challenge_and_no_verdict() -> None:
    mine = {"version": "1", "settings": {}, "problem": None}
    frame = bytes(admission._answer(b"key", b"challenge", 3, b"n" * NONCE_BYTES, mine).numpy())
    assert admission._judge(b"key", b"challenge", 3, frame, mine) is None
    for secret, challenge, rank in ((b"kay", b"challenge", 3), (b"key", b"challengf", 3), (b"key", b"challenge", 2)):
        refused = admission._judge(secret, challenge, rank, frame, mine)
        assert refused and refused[0] == rank
    verdict = proof(b"key", b"verdict", b"challenge", frame[PROOF_BYTES:])
    assert verdict != frame[:PROOF_BYTES], "an answer could be sent back as a verdict"


class Stranger(Alone):
    """Rank 1 of two, with a rank 0 that does not know the secret: it repeats what it has heard."""

    rank, size = 1, 2

    def broadcast(self, wire_B: Tensor) -> None:
        wire_B.zero_()

    def gather(self, messages: Iterable[Tensor], senders: Sequence[int], nbytes: int | None) -> Iterator[Chunk]:
        return iter(())


def test_a_false_server_is_not_followed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="rank 0 does not hold the secret of this rank"):
        admit(Stranger(), tiny(), HELD)
    assert capfd.readouterr().err.startswith("slora-dist [rank 1] error: SLORA_DIST_SECRET: ")


SAID = {  # by rank 0 and by the one that is refused
    "secret": ("rank 1 does not hold the secret of rank 0", "and this rank finds none"),
    "version": ("slora_dist: rank 1 runs version 0.0.9, rank 0 " + slora_dist.__version__,) * 2,
    "config": ("method.sparse.lr: rank 1 has 0.125, rank 0 has 0.003",) * 2,
}


def launched(launcher: str, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher == "mpiexec" and mpiexec is None:
        assert os.environ.get("CI") != "true", "CI must have an MPI: pip install 'slora-dist[mpi]'"
        pytest.skip("no mpiexec: pip install 'slora-dist[mpi]'")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    start = torchrun if launcher == "torchrun" else [str(mpiexec), "-n", str(ranks), sys.executable, "-m"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [*start, "tests.impostor", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | as_root | HELD, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
@pytest.mark.parametrize("kind", SAID)
def test_the_launched_job_ends_with_the_line_that_says_why(kind: str, launcher: str, tmp_path: Path) -> None:
    ended = launched(launcher, kind, "1", "train", str(TINY), "--out", str(tmp_path / "run"))
    told = [line for line in ended.stderr.splitlines() if line.startswith("slora-dist [")]
    assert ended.returncode == (1 if launcher == "torchrun" else 2), ended.stderr[-3000:]  # torchrun has one code for all failures
    assert [line for line in told if "[rank 0] error: " in line and SAID[kind][0] in line], ended.stderr[-3000:]
    assert [line for line in told if "[rank 1] error: " in line and SAID[kind][1] in line], ended.stderr[-3000:]
    assert SECRET not in ended.stderr + ended.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_a_rank_that_says_nothing_holds_nobody_up(launcher: str, tmp_path: Path) -> None:
    """Its time is that of a start, 2 s here, and not that of an operation, 1800 s."""
    ended = launched(launcher, "silent", "1", "train", str(TINY), "--out", str(tmp_path / "run"))
    assert ended.returncode == 1, ended.stderr[-3000:]
    said = {"torchrun": "broadcast failed: ", "mpiexec": "gather with rank 1 failed: "}[launcher]  # gloo's broadcast waits, MPI's does not
    assert f"[rank 0] failed in phase start, round 0, admission: rank 0: {said}" in ended.stderr, ended.stderr[-3000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.launcher
def test_a_rank_that_never_comes_holds_up_nobody_in_mpi_init(tmp_path: Path) -> None:
    ended = launched("mpiexec", "absent", "1", "train", str(TINY), "--out", str(tmp_path / "run"))
    assert ended.returncode != 0 and not (tmp_path / "run").exists()
    assert "[rank 0] died in phase start, round 0, connect within 120 s: " in ended.stderr, ended.stderr[-3000:]


@pytest.mark.launcher
@pytest.mark.parametrize(("launcher", "ranks", "summed"), [("torchrun", 2, "float"), ("mpiexec", 3, "exact")])
def test_a_launched_job_that_holds_together_is_played_and_audited(launcher: str, ranks: int, summed: str, tmp_path: Path) -> None:
    """Sealed, and over MPI masked, too: with the bits of a world of one in the clear."""
    short = ["method.sparse.rounds=1", "method.lowrank.rounds=1", "clients.epochs=1", "data.limit=60", f"comm.sum={summed}"]
    asked = [*short, "comm.secret=required", "comm.encrypt=true", f"comm.secure={summed == 'exact'}"]
    ended = launched(launcher, "nobody", "1", "train", str(TINY), *asked, "--out", str(tmp_path / "run"), ranks=ranks)
    assert ended.returncode == 0, ended.stderr[-3000:]
    audited = subprocess.run([sys.executable, "-m", "slora_dist", "audit", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert audited.returncode == 0, audited.stdout
    assert tensors(RunFolder(tmp_path / "run")) == tensors(run(tmp_path / "alone", *short)), "sealing changes no bit of the result"
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines if line["phase"] == "start" and line["rank"] == 1} >= {"challenge", "answer", "verdict"}
    down = [line for line in lines if line["direction"] == "down" and line["rank"] == 1]
    assert down and all(line["transport_bytes"] * line["clients"] == line["payload_bytes"] + 64 * line["clients"] for line in down)
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in content for content in written)
