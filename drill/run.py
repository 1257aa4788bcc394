"""``python -m drill.run [N] [--first SEED] [--only FAULT...]``: N drills with the seeds FIRST, FIRST + 1, ...; a table at the end.

The faults of a place that cannot be had here are left out, with a line that says why.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import flwr_datasets.partitioner  # noqa: F401  # imported once, here: ranks are forked from this process

import slora_dist.comm.torch_comm
import slora_dist.job  # noqa: F401
from drill import faults, hosts, mpi
from drill.one import Drill, Fault, Outcome


@dataclass(frozen=True)
class Place:
    """Where faults are played, and why they cannot be played there (nothing: they can)."""

    name: str
    faults: Mapping[str, Fault]
    lacking: Callable[[], str]


PLACES = (
    Place("gloo", faults.FAULTS, str),
    Place("MPI", mpi.FAULTS, mpi.lacking),
    Place("ULFM", mpi.ULFM_FAULTS, mpi.lacking_ulfm),
    Place("hosts", hosts.FAULTS, hosts.lacking),
)
ALL = {f"{place.name} {name}".removeprefix("gloo "): (place, fault) for place in PLACES for name, fault in place.faults.items()}
ON_DEMAND = {name: (PLACES[0], fault) for name, fault in faults.ON_DEMAND.items()}


def main() -> int:
    """Play the drills and print the table; 1 when one failed."""
    options = _options()
    names = chosen(options.only)
    rows, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="drill-") as scratch:
        references = Path(scratch) / "references"
        references.mkdir()
        for seed in range(options.first, options.first + (options.count if names else 0)):
            name, began = names[seed % len(names)], time.monotonic()
            place, fault = (ALL | ON_DEMAND)[name]
            drill = Drill(Path(scratch) / str(seed), references, seed)
            try:
                outcome = fault(drill)
                good = outcome.equal and outcome.audited and not outcome.lost
            except Exception:
                traceback.print_exc()
                outcome, good = Outcome(f"{name}: see above", None, -1, False, False), False
            if not good:
                print(drill.log.read_text(encoding="utf-8", errors="replace")[-6000:], file=sys.stderr)
            failed += not good
            rows.append(_row(seed, place.name, outcome, good, time.monotonic() - began))
            print(rows[-1], flush=True)
    head = [
        "| seed | over | injected | noticed within | finished rounds lost | bits as planned | audit | seconds | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if options.out:
        options.out.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    print(f"{len(rows)} drills, {failed} failed")
    return int(failed > 0)


def chosen(only: list[str] | None) -> list[str]:
    """Return the faults that are asked for and can be played; say why others are left out."""
    wanted = [name for name in ALL | ON_DEMAND if name in (only or ALL)]
    left_out = {}
    for place in PLACES:
        names = [name for name in wanted if (ALL | ON_DEMAND)[name][0] is place]
        if names and (reason := place.lacking()):
            print(f"left out: {', '.join(names)}: {reason}", flush=True)
            left_out.update(dict.fromkeys(names, reason))
    return [name for name in wanted if name not in left_out]


def _row(seed: int, place: str, outcome: Outcome, good: bool, seconds: float) -> str:
    noticed = "" if outcome.noticed is None else f"{outcome.noticed:.2f} s"
    equal, audited = ("yes" if fine else "**no**" for fine in (outcome.equal, outcome.audited))
    end = "" if good else "**failed**"
    return f"| {seed} | {place} | {outcome.injected} | {noticed} | {outcome.lost} | {equal} | {audited} | {seconds:.0f} | {end} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=len(ALL))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*ALL, *ON_DEMAND])
    parser.add_argument("--out", type=Path, help="file for the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
