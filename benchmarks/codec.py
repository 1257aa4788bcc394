"""Index coding at 1 %: bytes a position against the entropy of the mask, and the speed of decoding with validation.

Legend: M positions, B bytes.
"""

import math
import time

import numpy as np

from benchmarks.common import RUNS, Row, interleave, middle, ratio
from slora_dist import codec
from slora_dist.masks import random_mask

NUMEL, DENSITY = 22_700_000, 0.01  # a MiniLM
PROMISED = 200e6  # positions a second
MOST_BYTES = {False: 1.09, True: 1.02}


def rows() -> list[Row]:
    """Return the rows of both codes."""
    index_M = random_mask(NUMEL, round(DENSITY * NUMEL), seed=1)
    count, entropy = len(index_M), -(math.log2(DENSITY) + (1 / DENSITY - 1) * math.log2(1 - DENSITY)) / 8
    codes = {compact: codec.encode(index_M, NUMEL, compact) for compact in (False, True)}
    table, other = index_M.int().numpy(), np.empty(count, dtype=np.int64)
    seconds = interleave(
        {
            "gap": lambda: codec.decode(codes[False], NUMEL),
            "gap+zstd": lambda: codec.decode(codes[True], NUMEL, compact=True),
            "int32": lambda: np.copyto(other, table),  # what int32 positions cost at least: to be widened, unchecked
        },
        3 * RUNS,
        time.process_time,
    )
    found = []
    for compact, name in ((False, "gap"), (True, "gap+zstd")):
        size, limit = codes[compact].numel() / count, middle(seconds["int32"]) * PROMISED / count
        beside = {"million a second": count / middle(seconds[name]) / 1e6, "against int32": ratio(seconds[name], seconds["int32"])}
        against = "CPU seconds at 200 million positions a second, check included"
        found.append(Row(f"codec: {name}, bytes a position at 1 %", size, MOST_BYTES[compact], entropy, 1, "exact; int32: 4, COO: 16"))
        found.append(Row(f"codec: {name}, decoding", middle(seconds[name]) * PROMISED / count, 1.0, limit, 3 * RUNS, against, beside))
    return found
