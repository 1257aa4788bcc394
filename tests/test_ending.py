"""However a rank ends, one line says where it was, even while it waits inside a C call."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slora_dist.ending import LAST_WORDS
from tests.tiny import ROOT, SHORT, TINY, run, same

# The main thread blocks in a lock that only C code could release, as it does inside a transport.
_RANK = """
import sys, threading
from pathlib import Path
from slora_dist.ending import Where, Witness, speak_when_ended
where = Where(folder=Path(sys.argv[1]), finish=lambda: print("finished", flush=True))
witness = Witness(3, where)
speak_when_ended(3, where, witness)
where.phase, where.round, where.operation = "sparse", 5, "gather"
print("ready", flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 143, "slora-dist [rank 3] ended by SIGTERM in phase sparse, round 5, gather:"),
        (signal.SIGUSR1, 138, "slora-dist [rank 3] ended by SIGUSR1 in phase sparse, round 5, gather:"),
        (signal.SIGKILL, -9, "slora-dist [rank 3] died in phase sparse, round 5, gather:"),
    ],
)
def test_a_rank_that_is_ended_leaves_one_line(number: signal.Signals, code: int, line: str, tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", _RANK, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout and rank.stdout.readline() == "ready\n"
    rank.send_signal(number)
    printed, words = rank.communicate(timeout=60)  # ends when the witness, too, has closed the pipe
    assert rank.returncode == code
    assert printed == ("" if number == signal.SIGKILL else "finished\n"), "what is being written is finished first"
    assert words.startswith(line) and words.count("\n") == 1
    assert (tmp_path / LAST_WORDS.format(rank=3)).read_text() == words.removeprefix("slora-dist [rank 3] ")


def test_a_rank_that_ends_by_itself_has_a_silent_witness() -> None:
    code = "from slora_dist.ending import Where, Witness; Witness(0, Where()).dismiss()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""


def test_a_world_of_one_that_is_asked_to_leave_leaves_its_checkpoint(tmp_path: Path) -> None:
    """In its second round, while the checkpoint of the first may still be being written."""
    command = [sys.executable, "-m", "tests.impostor", "asked", "0", "train", str(TINY), *SHORT, "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 143, ended.stderr[-3000:]
    (line,) = ended.stderr.splitlines()
    assert line.startswith("slora-dist [rank 0] ended by SIGTERM in phase sparse, round 2, training of client ")
    assert line.endswith("; --resume goes on") and "another rank" not in line
    folder = run(tmp_path / "run", resume=True, stop_after=1)
    assert len(folder.lines("metrics")) == 1, "round 1 was whole"
    assert same(run(tmp_path / "run", resume=True), run(tmp_path / "undisturbed", *SHORT))
