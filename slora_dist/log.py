"""Words for people: errors and advice on stderr, each line saying which rank speaks."""

import sys


def say(rank: int, text: str) -> None:
    """Print one line on stderr."""
    print(f"slora-dist [rank {rank}] {text}", file=sys.stderr, flush=True)
