"""SIGTERM: one line that says where the rank was, even while it waits inside a C call, and an end at once."""

import signal
import subprocess
import sys

# The main thread blocks in a lock that only C code could release, as it does inside a transport.
_RANK = """
import sys, threading
from slora_dist.ending import Where, speak_when_ended
speak_when_ended(3, Where("sparse", 5, "gather"))
print("ready", flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def test_a_rank_that_is_ended_says_where_it_was() -> None:
    rank = subprocess.Popen([sys.executable, "-c", _RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout and rank.stdout.readline() == "ready\n"
    rank.send_signal(signal.SIGTERM)
    _, words = rank.communicate(timeout=60)
    assert rank.returncode == 143
    assert words.startswith("slora-dist [rank 3] ended by SIGTERM in phase sparse, round 5, gather:") and words.count("\n") == 1
