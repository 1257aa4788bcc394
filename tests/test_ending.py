"""However a rank ends, one line says where it was, even while it waits inside a C call."""

import signal
import subprocess
import sys

import pytest

# The main thread blocks in a lock that only C code could release, as it does inside a transport.
_RANK = """
import sys, threading
from slora_dist.ending import Where, Witness, speak_when_ended
where = Where(finish=lambda: print("finished", flush=True))
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
def test_a_rank_that_is_ended_leaves_one_line(number: signal.Signals, code: int, line: str) -> None:
    rank = subprocess.Popen([sys.executable, "-c", _RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout and rank.stdout.readline() == "ready\n"
    rank.send_signal(number)
    printed, words = rank.communicate(timeout=60)  # ends when the witness, too, has closed the pipe
    assert rank.returncode == code
    assert printed == ("" if number == signal.SIGKILL else "finished\n"), "what is being written is finished first"
    assert words.startswith(line) and words.count("\n") == 1


def test_a_rank_that_ends_by_itself_has_a_silent_witness() -> None:
    code = "from slora_dist.ending import Where, Witness; Witness(0, Where()).dismiss()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""
