"""The kernel as witness: what the ledger says of gloo is what went over the loopback interface."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _namespaces() -> str | None:
    """Why there is no network namespace to be had, or None."""
    if os.geteuid():
        return "a network namespace needs root"
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "unshare or ip is not installed"
    made = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return f"unshare -n fails: {made.stderr.decode().strip()}" if made.returncode else None


@pytest.mark.launcher
@pytest.mark.parametrize("nbytes", [1 << 22, 12_000_001])
def test_the_ledger_agrees_with_the_kernel_within_3_percent(nbytes: int, tmp_path: Path) -> None:
    if reason := _namespaces():
        pytest.skip(reason)
    line = 'ip link set lo up && exec "$0" -m tests.loopback "$1" "$2"'
    command = ["unshare", "-n", "sh", "-c", line, sys.executable, str(tmp_path), str(nbytes)]
    environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    played = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert played.returncode == 0, played.stderr[-3000:]
    told = json.loads(played.stdout.splitlines()[-1])
    assert told["ledger"] == {"broadcast": 2 * nbytes, "gather": 2 * nbytes}
    for verb, payload in told["ledger"].items():
        assert payload <= told["kernel"][verb] <= 1.03 * payload, (verb, told)
