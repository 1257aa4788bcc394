"""``python -m drill.run [N] [--first SEED] [--only FAULT]``: N drills with the seeds FIRST, FIRST + 1, ...; a table at the end."""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

import flwr_datasets.partitioner  # noqa: F401  # imported once, here: the ranks are forked from this process

import slora_dist.comm.torch_comm
import slora_dist.job  # noqa: F401
from drill.faults import FAULTS, ON_DEMAND, Drill, Outcome


def main() -> int:
    """Play the drills and print the table; 1 when one failed."""
    options = _options()
    faults = FAULTS | ON_DEMAND
    names = [name for name in faults if name in (options.only or FAULTS)]
    rows, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="drill-") as scratch:
        references = Path(scratch) / "references"
        references.mkdir()
        for seed in range(options.first, options.first + options.count):
            name, began = names[seed % len(names)], time.monotonic()
            drill = Drill(Path(scratch) / str(seed), references, seed)
            try:
                outcome = faults[name](drill)
                good = outcome.equal and outcome.audited and not outcome.lost
            except Exception:
                traceback.print_exc()
                outcome, good = Outcome(f"{name}: see above", None, -1, False, False), False
            if not good:
                print(drill.log.read_text(encoding="utf-8")[-6000:], file=sys.stderr)
            failed += not good
            rows.append(_row(seed, outcome, good, time.monotonic() - began))
            print(rows[-1], flush=True)
    head = [
        "| seed | injected | noticed within | finished rounds lost | bits as planned | audit | seconds | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if options.out:
        options.out.write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    print(f"{len(rows)} drills, {failed} failed")
    return int(failed > 0)


def _row(seed: int, outcome: Outcome, good: bool, seconds: float) -> str:
    noticed = "" if outcome.noticed is None else f"{outcome.noticed:.2f} s"
    equal, audited = ("yes" if fine else "**no**" for fine in (outcome.equal, outcome.audited))
    end = "" if good else "**failed**"
    return f"| {seed} | {outcome.injected} | {noticed} | {outcome.lost} | {equal} | {audited} | {seconds:.0f} | {end} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=len(FAULTS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*FAULTS, *ON_DEMAND])
    parser.add_argument("--out", type=Path, help="file for the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
