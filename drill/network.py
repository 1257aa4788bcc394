"""Several hosts on this one: network namespaces on a bridge, each behind a link of its own rate.

Host i of 1..N is named nodeI, has 10.77.0.I on eth0 and an /etc/hosts that knows the others. A route in the outer namespace makes sure
that no packet for these addresses ever leaves the machine.
"""

import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from drill.processes import output

NETWORK = "10.77.0"
GUARD = ["route", "add", "unreachable", f"{NETWORK}.0/24"]
PROGRAMS = ("ip", "tc", "unshare")
CLONE_NEWNET = 0x40000000
ONE_FRAME = ["gso_max_segs", "1"]  # else counters see frames of 64 kB, and headers are under-counted


class Network:
    """``hosts`` hosts and a switch."""

    def __init__(self, hosts: int, mbit: int = 100) -> None:
        self.mbit = mbit
        self.hosts, self.prefix = hosts, f"t{secrets.token_hex(3)}-"
        self.switch = f"{self.prefix}sw"

    def __enter__(self) -> "Network":
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def up(self) -> None:
        """Make the switch, then host after host."""
        subprocess.run(["ip", *GUARD], stderr=subprocess.DEVNULL)  # it may be there already
        output(["ip", "netns", "add", self.switch])
        self._ip(self.switch, "link", "add", "br0", "type", "bridge")
        self._ip(self.switch, "link", "set", "br0", "up")
        for number in range(1, self.hosts + 1):
            self._plug_in(number)

    def down(self) -> None:
        """Kill what still runs inside, and take all away."""
        for name in output(["ip", "netns", "list"]).split():
            if name.startswith(self.prefix):
                for pid in output(["ip", "netns", "pids", name]).split():
                    with suppress(ProcessLookupError):  # it has just ended
                        os.kill(int(pid), signal.SIGKILL)
                output(["ip", "netns", "delete", name])
                shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)

    def start(self, number: int, command: Sequence[str | Path], cwd: Path, environ: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command on a host, in a session of its own, both its streams in ``hostI.log`` in ``cwd``."""
        line = self.inside(number) + [str(part) for part in command]
        with (cwd / f"host{number}.log").open("w") as log:
            return subprocess.Popen(line, cwd=cwd, env=environ, text=True, stdout=log, stderr=log, start_new_session=True)

    def run(self, commands: Mapping[int, Sequence[str | Path]], cwd: Path, environ: Mapping[str, str], timeout: float = 150) -> None:
        """Run commands at the same time, {host: command}, and make sure that all end well."""
        deadline = time.monotonic() + timeout
        started = {number: self.start(number, command, cwd, environ) for number, command in commands.items()}
        for number, process in started.items():
            code = process.wait(max(0.1, deadline - time.monotonic()))
            assert code == 0, f"host {number}: exit code {code}\n{(cwd / f'host{number}.log').read_text()}"

    def inside(self, number: int) -> list[str]:
        """Return what makes the command behind it run on a host."""
        name = f'hostname node{number}; exec "$@"'
        return ["ip", "netns", "exec", f"{self.prefix}{number}", "unshare", "--uts", "bash", "-c", name, "on"]

    def enter(self, number: int) -> None:
        """Move the calling thread to a host: what it opens from now on is there, and so are threads and processes that it starts."""
        with Path(f"/var/run/netns/{self.prefix}{number}").open(encoding="ascii") as place:
            if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to host {number}")

    def set_link(self, number: int, state: str, at_switch: bool = False) -> None:
        """Set a host's link up or down: its own interface, or the switch's port at the other end, as when the cable is pulled."""
        name, device = (self.switch, f"port{number}") if at_switch else (f"{self.prefix}{number}", "eth0")
        self._ip(name, "link", "set", device, state)

    def shape(self, number: int, rate: str, burst: str = "32kb", queue: str = "400ms") -> None:
        """Give a host's link a rate, both ways. ``queue`` is how long a frame may wait: what comes then is dropped."""
        for name, device in ((f"{self.prefix}{number}", "eth0"), (self.switch, f"port{number}")):
            output(["tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", "burst", burst, "latency", queue, "rate", rate])

    def dropped(self, number: int) -> int:
        """Return the frames that a host's link has dropped, both ways."""
        ends = ((f"{self.prefix}{number}", "eth0"), (self.switch, f"port{number}"))
        told = [output(["tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", device]) for name, device in ends]
        return sum(int(queue["drops"]) for one in told for queue in json.loads(one))

    def processes(self) -> list[int]:
        """Return what runs on all hosts."""
        return [int(pid) for n in range(1, self.hosts + 1) for pid in output(["ip", "netns", "pids", f"{self.prefix}{n}"]).split()]

    def counters(self, number: int) -> dict[str, int]:
        """Return the bytes that a host's interface has received and transmitted: {rx, tx}."""
        folder = "/sys/class/net/eth0/statistics"
        rx, tx = output([*self.inside(number), "cat", f"{folder}/rx_bytes", f"{folder}/tx_bytes"]).split()
        return {"rx": int(rx), "tx": int(tx)}

    def _plug_in(self, number: int) -> None:
        host, port = f"{self.prefix}{number}", f"port{number}"
        folder = Path("/etc/netns", host)  # ip netns exec lays these files over /etc
        folder.mkdir(parents=True)
        names = [f"{NETWORK}.{n} node{n}" for n in range(1, self.hosts + 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        output(["ip", "netns", "add", host])
        self._ip(host, "link", "set", "lo", "up")
        self._ip(self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
        self._ip(self.switch, "link", "set", port, "master", "br0", *ONE_FRAME, "up")
        self._ip(host, "link", "set", "eth0", *ONE_FRAME, "up")
        self._ip(host, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        self.shape(number, f"{self.mbit}mbit")

    def _ip(self, namespace: str, *command: str) -> None:
        output(["ip", "-n", namespace, *command])
