"""What gloo's ledger says, and what the kernel saw on ``lo``, for one exchange among three ranks. Run in a network namespace of its own.

Prints JSON: the ledger's transport bytes by verb, and the bytes that the loopback interface moved meanwhile.
"""

import json
import sys
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from slora_dist.comm.metered import Metered
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.ledger import Label, Ledger
from slora_dist.ledger import line as ledger_line
from tests.ranks import run_ranks

SIZE, PLAYS = 3, 3
SECONDS = 60.0


def seen() -> int:
    """Bytes received on ``lo`` so far; every byte sent there is received there."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise AssertionError("no loopback interface")


def exchange(rank: int, size: int, folder: str, nbytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Play one broadcast and one gather of a client per worker: (payload by verb, bytes on ``lo`` by verb as rank 0 sees them)."""
    comm = Metered(TorchComm("gloo", rank, size, FileStore(f"{folder}/store", size), SECONDS), Ledger(rank))
    wire_B = torch.full((nbytes,), rank, dtype=torch.uint8)
    warm = Label("warm", 0, "control", {"warm": 64})
    moved = {}
    for verb in ("warm", "broadcast", "gather"):
        comm.comm.barrier()
        before = seen()
        comm.comm.barrier()  # all have read the counter before any goes on
        if verb != "gather":
            label = warm if verb == "warm" else Label("p", 1, "down", {"value": nbytes})
            comm.broadcast(wire_B[:64] if verb == "warm" else wire_B, label, clients=int(rank > 0))
        if verb != "broadcast":
            label, mine_B = (warm, wire_B[:64]) if verb == "warm" else (Label("p", 1, "up", {"value": nbytes}), wire_B)
            for _ in comm.gather([mine_B] if rank else [], range(1, size), label, mine_B.numel()):
                pass
        comm.comm.barrier()
        moved[verb] = seen() - before
        comm.comm.barrier()
    rows = [ledger_line(rank, entry, 0.0, 0.0) for entry in comm.ledger.take()]
    comm.comm.close()
    return {row["op"]: row["payload_bytes"] for row in rows if row["direction"] != "control"}, moved


def main() -> None:
    """Play the exchange some times and print what both sides counted, of the kernel the least: a busy machine retransmits."""
    plays = []
    for number in range(PLAYS):
        folder = Path(sys.argv[1], str(number))
        folder.mkdir()
        plays.append(run_ranks(SIZE, exchange, str(folder), int(sys.argv[2]), seconds=SECONDS))
    ledger = {verb: sum(payload[verb] for payload, _ in plays[0]) for verb in ("broadcast", "gather")}
    kernel = {verb: min(told[0][1][verb] for told in plays) for verb in ledger}
    print(json.dumps({"ledger": ledger, "kernel": kernel}))


if __name__ == "__main__":
    main()
