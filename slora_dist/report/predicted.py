"""Seconds of a round as ``timing`` foretells them for a measured machine, beside those that the run took."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from slora_dist import personal
from slora_dist.errors import ConfigError
from slora_dist.log import say
from slora_dist.network import agreements
from slora_dist.report.read import Line, Run

Parts = dict[str, float]  # mean seconds of a round, by the parts that ``timing`` foretells, and of all of it


def predicted(run: Run, machine: Path | None) -> dict[str, Parts] | None:
    """Return the foretold parts by phase, or None without a machine, or with one measured for another run, which is said.

    Raises ``ConfigError`` when the file is none of ``slora-dist doctor CONFIG``.
    """
    if machine is None:
        return None
    from slora_dist import timing  # they bring transformers and peft, which no other part of a report needs
    from slora_dist.data.federation import class_names
    from slora_dist.model import shell

    found = timing.read_machine(machine)
    try:
        timing.require_fit(run.config, found)
        if found["world"]["size"] != run.world["size"]:
            raise ConfigError("--machine", f"measured on {found['world']['size']} ranks", f"a file measured on {run.world['size']}")
    except ConfigError as error:
        say(0, f"no prediction for {run.path}: {error}")
        return None
    return timing.predict(run.config, shell(run.config.model, class_names(run.config)), found)


def measured(run: Run) -> dict[str, Parts]:
    """Return the same parts as the run had them: on emulated links those of the links, else those of the transport."""
    rounds = {phase: [_round(run, line) for line in run.rounds if line["phase"] == phase] for phase in run.phases}
    return {phase: {part: fmean(one[part] for one in found) for part in found[0]} for phase, found in rounds.items()}


def _round(run: Run, record: Line) -> Parts:
    links, seconds = record.get("network"), record["seconds"]
    if links:
        parts = {
            part: links[name] for part, name in (("broadcast", "download"), ("train", "train"), ("upload", "upload"), ("server", "server"))
        }
        return parts | {"control": 0.0, "round": links["seconds"]}
    alone = run.world["size"] == 1
    besides = ("communicate", "evaluate", "overlapped", *(["train"] if alone else []))
    lines = [line for line in run.ledger if line["round"] == record["round"]]
    agreed = agreements(run.config, len(record["clients"]))
    notes = [line for line in lines if line["direction"] == "control" and line["kind"] not in (*personal.KINDS, *agreed)]
    spans = [line for line in run.timeline if line["round"] == record["round"] and line["what"] == "train"]
    train = max(_by_rank(spans, 0).values(), default=0.0)
    upload = sum(line["seconds"] for line in lines if (line["direction"] == "up" or line["kind"] in agreed) and line["rank"] == 0)
    return {
        "broadcast": max(_by_rank((line for line in lines if line["direction"] == "down"), 1).values(), default=0.0),
        "train": train,
        "upload": upload if alone else max(0.0, upload - train),  # rank 0 waits in it while the others train
        "server": seconds["total"] - sum(seconds[part] for part in besides),
        "control": sum(line["seconds"] - line["wait_seconds"] for line in notes if line["rank"] == 0),
        "round": seconds["total"] - seconds["evaluate"],
    }


def _by_rank(lines: Iterable[Line], without_wait: int) -> dict[int, float]:
    sums: dict[int, float] = {}
    for line in lines:
        sums[line["rank"]] = sums.get(line["rank"], 0.0) + line["seconds"] - without_wait * line.get("wait_seconds", 0.0)
    return sums
