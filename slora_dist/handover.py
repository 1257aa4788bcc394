"""The matrices of a switch, factored by all ranks: each takes its share, rank 0 collects the factors.

An SVD does not depend on who does it, so the bits are those of rank 0 doing all of them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from slora_dist.agreement import gather_bytes
from slora_dist.comm.metered import Metered
from slora_dist.errors import RunError
from slora_dist.ledger import Label
from slora_dist.svd import Factors

PARTS = ("b", "a", "energies")


def spread(
    comm: Metered, layers: Sequence[str], factor: Callable[[Sequence[str]], Mapping[str, Factors]], label: Label
) -> dict[str, Factors]:
    """Return on rank 0 ``factor`` of all ``layers``, each done by one rank; elsewhere nothing. Raises ``RunError`` if some are missing."""
    shares = {rank: layers[at :: len(comm.members)] for at, rank in enumerate(comm.members)}
    mine = {f"{layer}/{part}": tensor for layer, found in factor(shares[comm.rank]).items() for part, tensor in _pack(found)}
    found: dict[str, Factors] = {}
    for rank, wire in gather_bytes(comm, save(mine), label).items():
        tensors, own = load(wire), shares[rank]
        if set(tensors) != {f"{layer}/{part}" for layer in own for part in PARTS}:
            raise RunError(f"rank {rank} sent other factors than those of its layers")
        found |= {layer: _unpack(*(tensors[f"{layer}/{part}"] for part in PARTS)) for layer in own}
    return {layer: found[layer] for layer in layers if found}


def _pack(found: Factors) -> list[tuple[str, Tensor]]:
    energies = torch.tensor([found.kept_energy, found.observed_residual, found.energy], dtype=torch.float64)
    return list(zip(PARTS, (found.b_OR.contiguous(), found.a_RI.contiguous(), energies), strict=True))


def _unpack(b_OR: Tensor, a_RI: Tensor, energies: Tensor) -> Factors:
    return Factors(b_OR, a_RI, *energies.tolist())
