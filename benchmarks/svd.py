"""The switch: exact factors of a 1 % update against ``torch.linalg.svd``, and how exact they are.

Legend: O/I out/in features.
"""

import time

import torch
from torch import Tensor

from benchmarks.common import RUNS, Row, interleave, middle, ratio
from slora_dist.masks import random_mask
from slora_dist.svd import factor

DENSITY = 0.01
SQUARE, RANK = (768, 768), 8
LARGE, LARGE_RANK = (4096, 11008), 16  # a feed-forward matrix of a 7 B model
DISTILBERT = [(768, 768)] * 24 + [(3072, 768)] * 6 + [(768, 3072)] * 6


def update(shape: tuple[int, int], seed: int = 1) -> Tensor:
    """Return an update as a sparse phase hands it over: dense, 1 % of it not zero."""
    numel = shape[0] * shape[1]
    index = random_mask(numel, round(DENSITY * numel), seed)
    flat = torch.zeros(numel)
    flat[index] = 1e-3 * torch.randn(len(index), generator=torch.Generator().manual_seed(seed))
    return flat.view(shape)


def kept(delta_OI: Tensor) -> float:
    """Return what our factors lack of the energy that the best ones of the same rank hold, as a share."""
    factors = factor(delta_OI, RANK)
    product = torch.linalg.matrix_norm(factors.b_OR.double() @ factors.a_RI.double()) ** 2
    best = torch.linalg.svdvals(delta_OI.double())[:RANK].square().sum()
    return abs(1 - float(product / best))


def rows() -> list[Row]:
    """Return the rows of the switch."""
    square, large = update(SQUARE), update(LARGE)
    model = [update(shape, seed) for seed, shape in enumerate(DISTILBERT)]
    one = interleave({"ours": lambda: factor(square, RANK), "full": lambda: torch.linalg.svd(square, full_matrices=False)}, 2 * RUNS)
    many = interleave(
        {"model": lambda: [factor(delta_OI, RANK) for delta_OI in model], "large": lambda: factor(large, LARGE_RANK)}, 5, time.process_time
    )
    speed = {"ms": 1e3 * middle(one["ours"]), "linalg.svd ms": 1e3 * middle(one["full"])}
    return [
        Row("svd: 768 x 768, 1 %, rank 8", ratio(one["ours"], one["full"]), 1 / 20, 1 / 30, 2 * RUNS, "torch.linalg.svd", speed),
        Row("svd: energy missed of the best rank 8", kept(square), 1e-4, 0.0, 1, "share of it; exact"),
        Row("svd: all matrices of a DistilBERT", middle(many["model"]), 5.0, 36 * middle(one["full"]) / 30, 5, "one CPU second"),
        Row("svd: 4096 x 11008, 1 %, rank 16", middle(many["large"]), 1.0, 0.13, 5, "one CPU second"),
    ]
