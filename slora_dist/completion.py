"""The switch of SLoRA by matrix completion: a sparse update is a sample of a matrix's entries, not a matrix that is zero elsewhere.

The factors minimise the weighted low-rank approximation (Srebro and Jaakkola 2003)

    sum over observed entries (dW - P)^2  +  w x sum over all others P^2,        P of rank R,

by alternating least squares as for implicit feedback (Hu, Koren and Volinsky 2008), from the SVD on. The weight w in (0, 1] is the
regularisation, as the belief that what was not observed is zero: at 1 the minimiser is the truncated SVD of the zero-filled update, near
0 the other entries have no say. It is chosen for each matrix by a tenth of the observations that is held out: where they are few against
the rank, or no low rank is behind them, it stays at 1.

Legend: O/I out/in features, R rank, n observed entries; L/M rows and columns of the matrix or of its transpose.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_dist.svd import Factors, Split, factor, fix_signs, place

Magnitude = Literal["step", "entries"]
Array = NDArray[np.float64]

_WEIGHTS = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01, 1e-3, 1e-4, 1e-6)
_HELD_OUT = 0.1
_SWEEPS = 4  # at each weight on the way; the next one goes on from where it ends
_LAST_SWEEPS = 30  # at the chosen weight, or fewer once it has converged
_CONVERGED = 1e-6  # share by which the fit grows in a sweep


def complete(
    delta_OI: Tensor,
    observed_n: Tensor | None,
    rank: int,
    scale: float = 1.0,
    split: Split = "us",
    magnitude: Magnitude = "entries",
) -> Factors:
    """Return LoRA factors whose ``scale * B A`` completes ``delta_OI`` from its entries at the flat positions ``observed_n`` (None: all).

    All else is as in ``svd.factor``, which is the result when all entries are observed, and when no smaller weight foretells the held-out
    ones better. Raises as it does. ``magnitude`` is the size of the product: that of the observed ``entries``, or the one at which it is
    closest to the zero-filled update, and so about as large a ``step`` of the model: entries that trained without the others went as far
    as it took, and all entries at that size would go up to 1 / density times as far.
    """
    by_svd = truncate(delta_OI, observed_n, rank, scale, split)
    if observed_n is None or len(observed_n) == delta_OI.numel() or not by_svd.energy:
        return by_svd
    delta, observed = delta_OI.detach().double().cpu().numpy(), np.sort(observed_n.cpu().numpy())
    chosen = _choose(delta, observed, rank)
    if chosen == 0:
        return by_svd
    start_IR = np.linalg.qr(by_svd.a_RI.double().numpy().T).Q
    *_, (b_OR, a_IR) = _descend(_Sample(delta, observed), start_IR, _WEIGHTS[: chosen + 1], _LAST_SWEEPS)
    u_OR, s_R, wt_RR = np.linalg.svd(b_OR, full_matrices=False)
    u_OR, s_R, vt_RI = fix_signs(u_OR, s_R, wt_RR @ a_IR.T)
    along = float(((delta @ vt_RI.T) * u_OR * s_R).sum())  # <dW, P>
    square = float(np.square(s_R).sum())
    s_R *= along / square if magnitude == "step" else 1
    found = Factors(*place(u_OR, s_R, vt_RI, scale, split), along**2 / (square * by_svd.energy), 0.0, by_svd.energy)
    return _measured(found, delta_OI, observed_n, scale)


def truncate(delta_OI: Tensor, observed_n: Tensor | None, rank: int, scale: float = 1.0, split: Split = "us") -> Factors:
    """Return ``svd.factor`` of the zero-filled update, with what it misses of the observed entries alone."""
    found = factor(delta_OI, rank, scale, split)
    return found if observed_n is None or not found.energy else _measured(found, delta_OI, observed_n, scale)


def _measured(found: Factors, delta_OI: Tensor, observed_n: Tensor, scale: float) -> Factors:
    rest_OI = delta_OI.detach().float().cpu() - scale * (found.b_OR @ found.a_RI)
    square = float(rest_OI.reshape(-1)[observed_n.cpu().sort().values].double().square().sum())
    return replace(found, observed_residual=square / found.energy)


class _Sample:
    """Observed entries of a matrix, by rows and by columns, as sparse matrices of their values and of ones."""

    def __init__(self, delta: Array, observed: NDArray[np.int64]) -> None:
        at = np.divmod(observed, delta.shape[1])
        self.x: Any = scipy.sparse.csr_array((delta.reshape(-1)[observed], at), shape=delta.shape)
        self.seen: Any = scipy.sparse.csr_array((np.ones(len(observed)), at), shape=delta.shape)
        self.x_T, self.seen_T = self.x.T.tocsr(), self.seen.T.tocsr()


def _choose(delta: Array, observed: NDArray[np.int64], rank: int) -> int:
    """Return the place of the weight that foretells held-out observations best; the search ends at the first that is worse."""
    held = np.random.Generator(np.random.Philox(0)).random(len(observed)) < _HELD_OUT
    rows, columns = np.divmod(observed[held], delta.shape[1])
    rest = delta.copy()
    rest[rows, columns] = 0
    start_IR = np.linalg.qr(factor(torch.from_numpy(rest), rank).a_RI.double().numpy().T).Q
    best, least = 0, np.inf
    for at, (b_OR, a_IR) in enumerate(_descend(_Sample(rest, observed[~held]), start_IR, _WEIGHTS, _SWEEPS)):
        error = np.square((b_OR[rows] * a_IR[columns]).sum(1) - delta[rows, columns]).sum()
        if error >= least:
            break
        best, least = at, error
    return best


def _descend(sample: _Sample, start_IR: Array, weights: Sequence[float], last: int) -> Iterator[tuple[Array, Array]]:
    """Yield B_OR and A_IR (orthonormal columns) at each weight, from the right factor ``start_IR`` on; the last one takes its time."""
    a_IR = start_IR
    for weight in weights:
        fit = 0.0
        for _ in range(last if weight == weights[-1] else _SWEEPS):
            b_OR, _ = _solve(sample.x, sample.seen, a_IR, weight)
            a_IR, now = _solve(sample.x_T, sample.seen_T, np.linalg.qr(b_OR).Q, weight)
            a_IR = np.linalg.qr(a_IR).Q
            if now - fit <= _CONVERGED * now:
                break
            fit = now
        b_OR, _ = _solve(sample.x, sample.seen, a_IR, weight)
        yield b_OR, a_IR


def _solve(x: Any, seen: Any, basis_MR: Array, weight: float) -> tuple[Array, float]:
    """Return the rows that fit best with an orthonormal basis: weighted ridge regressions, all at once; and how much they fit.

    Row l solves ((1 - w) sum over its observed columns of m m^T + w I) b_l = sum of x m, with the basis's rows m: never singular for w > 0.
    """
    rank = basis_MR.shape[1]
    upper = np.triu_indices(rank)
    pairs_LP = seen @ (basis_MR[:, upper[0]] * basis_MR[:, upper[1]])
    gram_LRR = np.empty((x.shape[0], rank, rank))
    gram_LRR[:, upper[0], upper[1]] = gram_LRR[:, upper[1], upper[0]] = (1 - weight) * pairs_LP
    gram_LRR += weight * np.eye(rank)
    right_LR = x @ basis_MR
    solved_LR = np.linalg.solve(gram_LRR, right_LR[:, :, None])[:, :, 0]
    return solved_LR, float((right_LR * solved_LR).sum())
