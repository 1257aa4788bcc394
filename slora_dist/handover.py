"""The matrices of a switch, factored by all ranks: each takes its share, rank 0 collects the factors.

An SVD does not depend on who does it, so the bits are those of rank 0 doing all of them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slora_dist.aggregate.factors import Pair
from slora_dist.agreement import gather_bytes
from slora_dist.comm.metered import Metered
from slora_dist.errors import RunError
from slora_dist.ledger import Label
from slora_dist.svd import Factors

PARTS = ("b", "a", "energies")


def spread(
    comm: Metered,
    layers: Sequence[str],
    factor: Callable[[Sequence[str]], Mapping[str, Factors]],
    pairs: Mapping[str, Pair],
    label: Label,
) -> dict[str, Factors]:
    """Return on rank 0 ``factor`` of all ``layers``, each done by one rank; elsewhere nothing. ``pairs`` tell the factors' shapes.

    Raises ``RunError`` naming a rank that sent others, or such as are not finite.
    """
    shares = {rank: layers[at :: len(comm.members)] for at, rank in enumerate(comm.members)}
    mine = {f"{layer}/{part}": tensor for layer, found in factor(shares[comm.rank]).items() for part, tensor in _pack(found)}
    found: dict[str, Factors] = {}
    for rank, wire in gather_bytes(comm, save(mine), label).items():
        tensors, own = _read(rank, wire), shares[rank]
        expected = {f"{layer}/{part}": form for layer in own for part, form in zip(PARTS, _forms(pairs[layer]), strict=True)}
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != expected:
            raise RunError(f"rank {rank} sent other factors than those of its layers")
        if not all(bool(tensor.isfinite().all()) for name, tensor in tensors.items() if not name.endswith(PARTS[2])):
            raise RunError(f"rank {rank} sent factors that are not finite")
        found |= {layer: _unpack(*(tensors[f"{layer}/{part}"] for part in PARTS)) for layer in own}
    return {layer: found[layer] for layer in layers if found}


def _read(rank: int, wire: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(wire)
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"rank {rank} sent factors that cannot be read ({error})") from None
    return tensors


def _forms(pair: Pair) -> Sequence[tuple[torch.dtype, tuple[int, ...]]]:
    return (torch.float32, (pair.out_features, pair.rank)), (torch.float32, (pair.rank, pair.in_features)), (torch.float64, (3,))


def _pack(found: Factors) -> list[tuple[str, Tensor]]:
    energies = torch.tensor([found.kept_energy, found.observed_residual, found.energy], dtype=torch.float64)
    return list(zip(PARTS, (found.b_OR.contiguous(), found.a_RI.contiguous(), energies), strict=True))


def _unpack(b_OR: Tensor, a_RI: Tensor, energies: Tensor) -> Factors:
    return Factors(b_OR, a_RI, *energies.tolist())
