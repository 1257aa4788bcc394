"""Differential privacy of clients: what one of them can change is bounded, and noise hides what it did change.

An update is clipped to an L2 norm C, and the sum of a round's updates gets Gaussian noise of standard deviation z C on every coordinate
(McMahan et al. 2018). Two federations are neighbours if one client differs with all of its documents: the sum then moves by up to 2 C.

Legend: N coordinates, K clients of a round.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_dist.config import Config
from slora_dist.errors import ConfigError
from slora_dist.secure import KEY_BYTES, stream
from slora_dist.seeding import derive


def clip(update_N: Tensor, most: float) -> Tensor:
    """Return the update, scaled down to an L2 norm of ``most`` if it is longer. What is not finite stays so."""
    norm = float(update_N.double().norm())
    return update_N * (most / norm * (1 - 1e-6)) if norm > most else update_N  # float32 rounding must not take it above again


def noise(config: Config, numel: int, share: float, number: int, who: int) -> Tensor:
    """Return the Gaussian noise (float32) that ``who`` adds in round ``number``: a ``share`` of the sum's variance.

    Its randomness is the system's, or with ``privacy.seeded`` follows from the run's seed: then it repeats, and hides nothing from
    those who know the seed.
    """
    settings = config.privacy
    assert settings.clip is not None
    seed = f"{derive(config.run.seed, 'noise', number, who)}".encode()
    key = hashlib.sha256(seed).digest() if settings.seeded else os.urandom(KEY_BYTES)
    return normal(key, numel) * (settings.noise_multiplier * settings.clip * math.sqrt(share))


def normal(key: bytes, numel: int) -> Tensor:
    """Return ``numel`` standard normal numbers (float32) from ChaCha20's stream of a key of one use, by Box and Muller's transform."""
    words = np.frombuffer(stream(key, 16 * -(-numel // 2)), dtype=np.uint64).reshape(2, -1)
    radius, angle = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    length = np.sqrt(-2 * np.log(radius))
    pairs = np.concatenate([length * np.cos(2 * np.pi * angle), length * np.sin(2 * np.pi * angle)])
    return torch.from_numpy(pairs[:numel].astype(np.float32))


def epsilon(noise_multiplier: float, delta: float, sums: Mapping[tuple[int, int], int]) -> float:
    """Return epsilon at ``delta`` after noisy sums: ``sums[N, K]`` of them over K clients, drawn without replacement from N.

    Client-level, replace-one: noise of ``noise_multiplier`` x clip on a sum that one client moves by 2 x clip. Renyi accounting by
    ``dp-accounting``.
    """
    from dp_accounting.rdp import compute_epsilon

    told = [(count, _one_sum(noise_multiplier, present, drawn)) for (present, drawn), count in sums.items()]
    orders = told[0][1][0]
    return float(compute_epsilon(orders, sum(count * divergence for count, (_, divergence) in told), delta)[0])


def check_accounting(config: Config) -> None:
    """Raise ``ConfigError`` where epsilon is to be told and cannot be worked out."""
    if config.privacy.noise_multiplier and find_spec("dp_accounting") is None:
        raise ConfigError("privacy.noise_multiplier", "needs dp-accounting, which is not installed", "pip install 'slora-dist[dp]', or 0")


@cache
def _one_sum(noise_multiplier: float, clients: int, sampled: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the Renyi divergence of one sum by order: (orders, divergences). Those of several add up, the orders are always the same."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
    if sampled < clients:
        event = dp_accounting.SampledWithoutReplacementDpEvent(clients, sampled, event)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE).compose(event)
    return accountant.orders, accountant.rdp


def spent(config: Config, taken: Sequence[Mapping[str, int]]) -> dict[str, float] | None:
    """Return what is known of a client after all sums that were ``taken``, or None when no noise is added.

    A sum has its ``round``, the number of clients that were ``present`` and of those ``drawn`` from them: where clients are missing each
    of the others is drawn more often. A round that was played again had two. ``epsilon`` holds against those who do not know who was drawn,
    ``epsilon_unsampled`` against everybody.
    """
    settings = config.privacy
    if not settings.noise_multiplier:
        return None
    every = [(one["round"], one["present"], one["drawn"]) for one in taken]
    drawn = Counter((present, drawn) for _, present, drawn in (set(every) if settings.seeded else every))  # seeded noise is the same again
    known = Counter({(1, 1): drawn.total()})
    sampled, unsampled = (epsilon(settings.noise_multiplier, settings.delta, sums) for sums in (drawn, known))
    return {"epsilon": sampled, "epsilon_unsampled": unsampled, "delta": settings.delta}
