"""A real SLURM on this host: munged, slurmctld and several slurmd, as root, without systemd and cgroups.

Every node has a host name, an address 127.0.0.x, a port and an /etc/hosts of its own (UTS and mount namespace), so that node names mean
something inside a job and nothing outside.
"""

import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from drill.processes import alive, output, until
from tests.cluster.processes import having

TEND = 5  # seconds between two looks at nodes and jobs that SLURM has put aside
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"}

CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for cred_expire, and a step that a busy machine starts later than that is refused
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=5
InactiveLimit=0
JobRequeue=1
MailProg=/bin/true
SlurmdParameters=config_overrides
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """``nodes`` SLURM nodes; ``folder`` must be short, since a socket's path has 107 bytes at most."""

    def __init__(self, folder: Path, nodes: int, environ: Mapping[str, str]) -> None:
        self.folder, self.nodes = folder, nodes
        self.environ = {name: value for name, value in environ.items() if not name.startswith("SLURM_")}
        self.environ["SLURM_CONF"] = str(folder / "slurm.conf")

    def up(self) -> None:
        """Start the daemons and return when all nodes are idle."""
        self._write()
        key, sock = self.folder / "munge.key", self.folder / "munge.sock"
        names = [f"--{what}-file={self.folder}/munged.{what}" for what in ("pid", "log", "seed")]
        output(["munged", f"--key-file={key}", f"--socket={sock}", *names])
        output(["slurmctld", "-i"], env=self.environ)
        for number in range(1, self.nodes + 1):
            self._serve(number)
        until(lambda: self("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * self.nodes, "all nodes idle")

    def down(self) -> None:
        """End all jobs, then the daemons, then whatever still carries this cluster's name."""
        daemons = [int(file.read_text()) for file in self.folder.glob("*.pid")]
        with suppress(AssertionError, TimeoutError, subprocess.TimeoutExpired):  # without a controller all is killed below, all the same
            self("scancel", "--user=root", timeout=5)
            until(lambda: not self("squeue", "-h", timeout=5), "all jobs gone", 20)
        for pid in daemons:
            os.kill(pid, signal.SIGTERM) if alive(pid) else None
        until(lambda: not any(alive(pid) for pid in daemons), "daemons gone", 20)
        for pid in having({"SLURM_CONF": self.environ["SLURM_CONF"]}):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder)

    def __call__(self, *command: str | Path, timeout: float = 30, cwd: Path | None = None) -> str:
        """Run a SLURM client: one that finds no node or no controller would wait for ever."""
        return output(command, timeout, env=self.environ, cwd=cwd)

    def submit(self, *arguments: str | Path, cwd: Path) -> str:
        """Submit a batch job from ``cwd``, its output in ``JOB.out`` there, and return its number."""
        return self("sbatch", "--parsable", "--output=%A.out", *arguments, cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "-o", "show", "job", number)))

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Return as soon as ``condition`` holds; an error says what SLURM was at.

        On a busy machine SLURM itself may fail: a batch job that could not be launched is held and its node drained, or a daemon is gone.
        """
        tended = time.monotonic()

        def holds() -> bool:
            nonlocal tended
            if time.monotonic() > tended + TEND:
                self._tend()
                tended = time.monotonic()
            return condition()

        try:
            until(holds, what, timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self._state()}") from None

    def wait(self, number: str, timeout: float = 120) -> dict[str, str]:
        """Return a job's facts once it has ended."""
        try:
            self.until(lambda: self.job(number)["JobState"] in ENDED, f"the end of job {number}", timeout)
        except TimeoutError:
            self("scancel", number)  # the next ones need its nodes
            raise
        return self.job(number)

    def _tend(self) -> None:
        """Start daemons anew that are gone; take back the nodes that SLURM drained and the jobs that it holds."""
        for number in range(1, self.nodes + 1):
            if not alive(int((self.folder / f"slurmd-node{number}.pid").read_text())):
                print(f"node{number}: no slurmd; started anew")
                self._serve(number)
        for line in self("sinfo", "-h", "-N", "-t", "drain,down", "-o", "%N %E").splitlines():
            print(f"{line}: resumed")
            self("scontrol", "update", f"NodeName={line.split()[0]}", "State=RESUME")
        for line in self("squeue", "-h", "-r", "-t", "pending", "-o", "%i %r").splitlines():
            if "held" in line.lower():
                print(f"job {line}: released")
                self("scontrol", "release", line.split()[0])

    def _state(self) -> str:
        """Return the queue, the nodes, what each job printed last, and the last complaints of each daemon."""
        said = [self("squeue", "-r", "-o", "%i %T %r"), self("sinfo", "-N", "-o", "%N %T %E")]
        for number in self("squeue", "-h", "-t", "running", "-o", "%A").split():
            printed = Path(self.job(number)["StdOut"])
            said += [str(printed), *(printed.read_text().splitlines()[-20:] if printed.exists() else [])]
        for file in sorted(self.folder.glob("*.log")):
            complaints = [line for line in file.read_text().splitlines() if "error" in line and "pmix" not in line]
            said += [file.name, *complaints[-10:]]
        return "\n".join(said)

    def _serve(self, number: int) -> None:
        inside = f"hostname node{number} && mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -N node{number}"
        output(["unshare", "--uts", "--mount", "bash", "-c", inside], env=self.environ)

    def _write(self) -> None:
        for name in ("", "state", *(f"spool-node{number}" for number in range(1, self.nodes + 1))):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o400)
        ports = _free_ports(self.nodes + 1)
        lines, hosts = [], ["127.0.0.1 localhost"]
        for number, port in enumerate(ports[1:], start=1):
            lines.append(f"NodeName=node{number} NodeAddr=127.0.0.{10 + number} Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN\n")
            hosts.append(f"127.0.0.{10 + number} node{number}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        conf, _, partition = CONF.format(folder=self.folder, port=ports[0]).rpartition("PartitionName")
        (self.folder / "slurm.conf").write_text(conf + "".join(lines) + "PartitionName" + partition)


def _free_ports(count: int) -> list[int]:
    """Return ports that nothing listens at, below those that the kernel gives to clients."""
    free = []
    for port in random.sample(range(20000, 32000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            break
    return free
