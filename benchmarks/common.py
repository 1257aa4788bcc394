"""What every benchmark shares: interleaved measurement, ratios, and the row that comes of them.

A time on a shared machine says little, a ratio of two times taken one after the other says much: each round measures every contender once,
in turn, and a row is the median of the rounds' ratios.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

RUNS = 7
Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One line of the table: smaller is better, and ``ratio <= target`` means met. ``limit`` is what nobody could get below.

    ``against`` says what is divided by what; ``beside`` are absolute figures that may stand beside the ratio.
    """

    name: str
    ratio: float
    target: float
    limit: float
    runs: int
    against: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.ratio <= self.target


def interleave(
    contenders: Mapping[str, Callable[[], object]], runs: int = RUNS, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each contender in each of ``runs`` rounds, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs + 1):
        for name, play in contenders.items():
            began = clock()
            play()
            seconds[name].append(clock() - began)
    return {name: taken[1:] for name, taken in seconds.items()}


def ratio(ours: Sequence[float], rival: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(mine / theirs for mine, theirs in zip(ours, rival, strict=True))


def middle(seconds: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(seconds)
