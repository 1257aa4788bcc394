"""Accuracy against what it cost: rounds, bytes, seconds; and what a common budget or a wanted accuracy means for each group.

All costs are sums from the run's first round on. ``client`` is one client that takes part in every round, the standard of comparison
(it does not depend on how many clients a round has); ``payload`` is what all clients of the rounds together sent and received.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from slora_dist.report.read import Group, Run


@dataclass(frozen=True)
class Point:
    """A run after a round. ``accuracy`` is None where the round was not evaluated, ``network`` where no link was emulated.

    ``perplexity`` is that of causal language models.
    """

    round: int
    accuracy: float | None
    client: float  # bytes
    payload: float  # bytes
    seconds: float  # wall time, without evaluation
    training: float  # seconds in which a client of mean speed trained, and of the switch
    network: float | None  # virtual seconds on emulated links
    perplexity: float | None = None


@dataclass(frozen=True)
class Mean:
    """A group where all its runs were evaluated after the same round: ``at`` are the runs' points, in order."""

    at: tuple[Point, ...]

    def value(self, axis: str) -> float:
        """Return the mean of ``axis`` over the runs."""
        return fmean(getattr(point, axis) for point in self.at)

    def span(self, measure: str) -> tuple[float, float]:
        """Return the lowest and the highest of the runs' figures."""
        found = [getattr(point, measure) for point in self.at]
        return min(found), max(found)


def points(run: Run) -> list[Point]:
    """Return the state of the run after each round, costs summed up."""
    switch = switch_seconds(run)
    found: list[Point] = []
    last = Point(0, None, 0, 0, 0, 0, 0)
    for line in run.rounds:
        number, seconds, net = line["round"], line["seconds"], line.get("network")
        last = Point(
            number,
            line["accuracy"],
            last.client + sum(run.client.get(number, {}).values()),
            last.payload + sum(line["payload_bytes"].values()),
            last.seconds + seconds["total"] - seconds["evaluate"] + switch.get(number, 0.0),
            last.training + seconds["train"] / len(line["clients"]) + switch.get(number, 0.0),
            last.network + net["seconds"] if net and last.network is not None else None,
            line.get("perplexity"),
        )
        found.append(last)
    return found


def switch_seconds(run: Run) -> dict[int, float]:
    """Return the seconds of rank 0's switches by round, their evaluation left out."""
    mine = [line for line in run.timeline if line["rank"] == 0]
    found: dict[int, float] = {}
    for line in (line for line in mine if line["what"] == "switch"):
        end = line["began"] + line["seconds"]
        inside = sum(other["seconds"] for other in mine if other["what"] == "evaluate" and line["began"] <= other["began"] < end)
        found[line["round"]] = found.get(line["round"], 0.0) + line["seconds"] - inside
    return found


def evaluated(run: Run) -> list[Point]:
    """Return the points that have an accuracy."""
    return [point for point in points(run) if point.accuracy is not None]


def curve(group: Group) -> list[Mean]:
    """Return the group after every round that all its runs have evaluated."""
    of_runs = [{point.round: point for point in evaluated(run)} for run in group.runs]
    shared = sorted(set.intersection(*(set(found) for found in of_runs)))
    return [Mean(tuple(found[number] for found in of_runs)) for number in shared]


def common_budget(groups: Sequence[Group], axis: str) -> float | None:
    """Return the most that every finished run has spent on ``axis`` (a field of ``Point``), or None where one has no such figure."""
    spent = [getattr(points(run)[-1], axis) for group in groups if group.finished for run in group.runs]
    return None if not spent or None in spent else float(min(spent))


def within(run: Run, axis: str, budget: float) -> Point | None:
    """Return the last evaluated point not beyond the budget, if the run has such a figure; nothing is interpolated."""
    spent = ((point, getattr(point, axis)) for point in reversed(evaluated(run)))
    return next((point for point, figure in spent if figure is not None and figure <= budget), None)


def reaches(run: Run, target: float) -> Point | None:
    """Return the first evaluated point with an accuracy of at least ``target``."""
    return next((point for point in evaluated(run) if point.accuracy is not None and point.accuracy >= target), None)


def minutes(point: Point, mbit: float) -> float:
    """Return the minutes of one client: ``(8 bytes / (mbit 10^6) + training) / 60``, both ways over the same link, one after the other."""
    return (point.client * 8 / (mbit * 1e6) + point.training) / 60
