"""All checks of an audit, and what they say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slora_dist.audit import kernel, lines, sums
from slora_dist.audit.run import Run
from slora_dist.runfolder import RunFolder

CHECKS: dict[str, Callable[[Run], Iterable[str] | None]] = {
    "ledger: every line adds up": lines.arithmetic,
    "ledger: every rank has the lines that the settings demand": lines.protocol,
    "ledger: rank 0 received what the others sent": lines.gathers,
    "ledger: payload is the plan's, by round, phase, direction and kind": sums.plan,
    "metrics: the clients are the seed's, the bytes the ledger's": sums.records,
    "summary: every figure comes out of the other files": sums.summary,
    "counters: sockets carried what the ledger says": kernel.sockets,
    "counters: interfaces carried what the ledger says": kernel.interfaces,
}


@dataclass(frozen=True)
class Check:
    """What was compared, and a sentence for each thing that does not agree; ``faults`` is None when there was nothing to compare."""

    name: str
    faults: list[str] | None


def audit(folder: RunFolder) -> list[Check]:
    """Make all checks on a run, as far as it got. Raises ``ConfigError`` when its folder, model or data cannot be read."""
    run = Run(folder)
    return [Check(name, None if (faults := check(run)) is None else list(faults)) for name, check in CHECKS.items()]


def report(checks: Iterable[Check]) -> list[str]:
    """Return a line for each check, and below it what does not agree."""
    told = []
    for check in checks:
        told.append(("-    " if check.faults is None else "WRONG" if check.faults else "ok   ") + f" {check.name}")
        told += [f"      {fault}" for fault in check.faults or ()]
    return told
