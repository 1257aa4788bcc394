"""Several machines: the page that users follow, and the ledger against what their interfaces counted."""

import sys
from pathlib import Path

import pytest

from drill.network import Network
from drill.processes import until
from tests.cluster.conftest import REPOSITORY
from tests.cluster.runs import adapter, lines, ranks

pytestmark = pytest.mark.cluster

# all weights of a wider model travel: about 5 MB a message, so that what else is said does not count
LARGE = (
    "configs/tiny.yaml",
    "method.name=fft",
    "method.dense.rounds=3",
    "model.config.hidden_size=256",
    "model.config.intermediate_size=512",
    "data.limit=96",
    "clients.count=3",
    "clients.per_round=3",
    "clients.epochs=1",
)
WITH_HEADERS = (1.04, 1.10)  # Ethernet, IP and TCP headers make 1.046 at an MTU of 1500; acknowledgements come on top


def test_two_machines_run_what_the_page_says(network: Network, shared: Path, environ: dict[str, str]) -> None:
    page = (REPOSITORY / "docs/cluster.md").read_text()
    (command,) = [line for line in page.splitlines() if line.startswith("NODES=2 ")]
    network.run({number: ["bash", "-c", command] for number in (1, 2)}, shared, environ)
    run = shared / "runs/two-machines"
    assert (run / "summary.json").exists() and ranks(run) == {0, 1, 2, 3}
    assert adapter(run)
    until(lambda: not network.processes(), "no process left on any host")


# What crosses the interfaces of four hosts in one round, in messages: received by the root, sent by the root, sent by all together.
# A gather is a star (3, 0, 3) and a broadcast a binomial tree (0, 2, 3); gloo's reduce is a ring
# (1.5, 0.75, 3.75), MPICH's halves recursively and then gathers (1.5, 0.75, 4).
FACTORS = {
    ("gloo", "gather"): (3, 2, 6),
    ("gloo", "reduce"): (1.5, 2.75, 6.75),
    ("mpi", "gather"): (3, 2, 6),
    ("mpi", "reduce"): (1.5, 2.75, 7),
}


@pytest.mark.parametrize(("transport", "collective"), FACTORS)
def test_the_ledger_agrees_with_what_the_interfaces_counted(
    network: Network, shared: Path, environ: dict[str, str], transport: str, collective: str
) -> None:
    hosts = range(1, network.hosts + 1)
    before = {number: network.counters(number) for number in hosts}
    arguments = [*LARGE, f"comm.collective={collective}", "--out", "run"]
    if transport == "gloo":
        together = environ | {"NODES": "4", "HEAD": "node1"}
        network.run({number: ["launch/torchrun.sh", *arguments] for number in hosts}, shared, together)
    else:
        network.run({1: ["launch/mpirun.sh", *arguments]}, shared, environ | _mpich(network, shared))
    counted = {number: {way: value - before[number][way] for way, value in network.counters(number).items()} for number in hosts}
    down, up = _moved(shared / "run", "broadcast"), _moved(shared / "run", collective)
    messages = down[1]
    assert messages > 10e6
    assert [up[rank] for rank in range(1, network.hosts)] == pytest.approx([messages] * (network.hosts - 1), rel=0.01)  # and small talk
    measured = (counted[1]["rx"], counted[1]["tx"], sum(host["tx"] for host in counted.values()))
    ratios = [count / (factor * messages) for count, factor in zip(measured, FACTORS[transport, collective], strict=True)]
    print(transport, collective, [round(ratio, 3) for ratio in ratios])
    assert all(WITH_HEADERS[0] <= ratio <= WITH_HEADERS[1] for ratio in ratios), ratios
    assert all(counted[number]["rx"] >= WITH_HEADERS[0] * messages for number in hosts), counted


def _moved(run: Path, op: str) -> dict[int, int]:
    """Return the transport bytes of one operation, rank by rank."""
    sums: dict[int, int] = {}
    for line in lines(run, "ledger.jsonl"):
        if line["op"] == op:
            sums[line["rank"]] = sums.get(line["rank"], 0) + line["transport_bytes"]
    return sums


def _mpich(network: Network, folder: Path) -> dict[str, str]:
    """Return the variables by which MPICH's mpiexec reaches the hosts: a stand-in for ssh, and TCP instead of the memory they share."""
    stand_in = folder / "ssh"
    stand_in.write_text(
        "#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nhost=${1#node}; shift\n"
        f'exec ip netns exec "{network.prefix}$host" unshare --uts bash -c "hostname node$host; $*"\n'
    )
    stand_in.chmod(0o755)
    return {
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": str(stand_in),
        "HYDRA_IFACE": "eth0",
        "UCX_TLS": "self,tcp",
        "UCX_NET_DEVICES": "eth0",
        "RANKS": str(network.hosts),
        "HOSTS": ",".join(f"node{number}:1" for number in range(1, network.hosts + 1)),
    }


def test_a_pulled_cable_counts_as_death(network: Network, shared: Path, environ: dict[str, str]) -> None:
    """A host that is cut off says nothing and is told nothing: the others go on without it, and it ends by itself."""
    rounds = ("method.sparse.rounds=30", "method.lowrank.rounds=2", "clients.count=3", "clients.per_round=3", "clients.epochs=1")
    command = [sys.executable, "-m", "slora_dist", "train", "configs/tiny.yaml", *rounds, "data.limit=96", "data.test_limit=16"]
    meet = environ | {"WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
    heals = [*command, "clients.min_clients=2", "comm.client_timeout=8", "--out", "heals"]
    started = {host: network.start(host, heals, shared, meet | {"RANK": str(host - 1)}) for host in range(1, 5)}
    until(lambda: len(lines(shared / "heals", "metrics.jsonl")) >= 3, "three rounds", 90)
    network.set_link(3, "down")
    codes = {host: process.wait(120) for host, process in started.items()}
    network.set_link(3, "up")
    log = (shared / "host1.log").read_text()
    assert codes == {1: 3, 2: 3, 3: 4, 4: 3}, log + (shared / "host3.log").read_text()
    assert "[rank 0] rank 2 is gone: silent for 8 s" in log
    records = lines(shared / "heals", "metrics.jsonl")
    assert [record["round"] for record in records] == list(range(1, 33)) and records[-1]["missing"] == {"ranks": [2], "clients": [1]}
