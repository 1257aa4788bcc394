"""The switch of SLoRA: the best rank-r factors of an accumulated update.

Legend: O/I out/in features, R rank, Q columns of a product's left factor. ``delta_OI`` is factored as B A with B_OR and A_RI,
and peft adds ``scale * B A`` to the weight.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

Split = Literal["us", "sqrt"]

# ARPACK beats the full SVD on both speed and memory when the rank is a small share of the matrix; above it the full one is as fast.
_FULL_ABOVE = 1 / 5
_SPARSE_BELOW = 0.05  # density up to which products with a sparse matrix win
_TOLERANCE = 1e-9  # of the Gram matrix's eigenvectors: finer than the float32 in which the factors are kept


@dataclass(frozen=True)
class Factors:
    """The two LoRA factors of one matrix. ``energy`` is its ||dW||^2.

    ``kept_energy`` is the share of it that lies along the product (for the SVD: in the r largest singular values),
    ``observed_residual`` the share by which the product misses the entries that have trained.
    """

    b_OR: Tensor
    a_RI: Tensor
    kept_energy: float
    observed_residual: float
    energy: float


def factor(delta_OI: Tensor, rank: int, scale: float = 1.0, split: Split = "us") -> Factors:
    """Return the truncated SVD of ``delta_OI`` as LoRA factors, so that ``scale * B A`` is its best approximation of ``rank``.

    ``split`` puts the singular values into B (``us``, the paper: B = U S, A = V^T) or their roots into both (``sqrt``); B is divided by
    ``scale`` = alpha / r. The signs are fixed, so the same matrix gives the same bits. Raises ValueError when the rank exceeds the
    matrix or an entry is not finite. A matrix of zeros gives B = 0 and orthonormal rows in A, from which LoRA can train.
    """
    if not 1 <= rank <= min(delta_OI.shape):
        raise ValueError(f"rank {rank} of a {delta_OI.shape[0]} x {delta_OI.shape[1]} matrix")
    matrix = _matrix(delta_OI.detach().float().cpu().numpy())
    entries = matrix.data if scipy.sparse.issparse(matrix) else matrix
    if not np.isfinite(entries).all():
        raise ValueError("the update has entries that are not finite")
    energy = float(np.square(entries).sum())
    u_OR, s_R, vt_RI = fix_signs(*_truncated(matrix, rank, energy))
    b_OR, a_RI = place(u_OR, s_R, vt_RI, scale, split)
    kept = float((s_R**2).sum() / energy) if energy else 1.0
    return Factors(b_OR, a_RI, kept_energy=kept, observed_residual=1 - kept, energy=energy)


def factor_product(left_OQ: Tensor, right_QI: Tensor, rank: int, scale: float = 1.0, split: Split = "us") -> tuple[Tensor, Tensor]:
    """Return (b_OR, a_RI) as ``factor`` does, of the product of two thin matrices, which is never formed.

    QR of both leaves a core of Q x Q; its SVD is that of the product (FLoRIST, Ramesh and Dharma 2025). Needs Q >= ``rank``.
    """
    q_OQ, r_QQ = np.linalg.qr(left_OQ.double().numpy())
    p_IQ, t_QQ = np.linalg.qr(right_QI.T.double().numpy())
    u, s, vt = np.linalg.svd(r_QQ @ t_QQ.T)
    u_OR, s_R, vt_RI = fix_signs(q_OQ @ u[:, :rank], s[:rank], vt[:rank] @ p_IQ.T)
    return place(u_OR, s_R, vt_RI, scale, split)


def place(u_OR: np.ndarray, s_R: np.ndarray, vt_RI: np.ndarray, scale: float, split: Split) -> tuple[Tensor, Tensor]:
    """Return B and A of which ``scale * B A`` is U S V^T.

    Where a singular value is zero, to the precision in which the factors are kept, B has a column of zeros and A a row of length 1: a pair
    of which both are zero would get no gradient, and never train.
    """
    if split == "us":
        left_R, right_R = s_R, np.ones_like(s_R)
    else:
        dead_R = s_R <= np.finfo(np.float32).eps * s_R.max()
        left_R, right_R = np.where(dead_R, 0.0, np.sqrt(s_R)), np.where(dead_R, 1.0, np.sqrt(s_R))
    return torch.from_numpy(u_OR * left_R / scale).float(), torch.from_numpy(right_R[:, None] * vt_RI).float()


def _matrix(delta_OI: np.ndarray) -> Any:
    """Return the matrix in float64, and sparse where few entries are not zero: a NaN is none, and so is kept.

    scipy's own conversion looks for non-zero floats one by one, and takes longer than the SVD.
    """
    flat, (height, width) = delta_OI.reshape(-1), delta_OI.shape
    at = np.flatnonzero(flat != 0)
    if len(at) > _SPARSE_BELOW * flat.size:
        return delta_OI.astype(np.float64)
    rows = np.arange(height + 1) * width
    starts = np.searchsorted(at, rows)
    columns = at - np.repeat(rows[:-1], np.diff(starts))
    return scipy.sparse.csr_array((flat[at].astype(np.float64), columns.astype(np.int32), starts.astype(np.int32)), shape=delta_OI.shape)


def _truncated(matrix: Any, rank: int, energy: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U_OR, S_R (descending) and Vt_RI of the ``rank`` largest singular values, exact to rounding."""
    is_sparse = scipy.sparse.issparse(matrix)
    if rank > _FULL_ABOVE * min(matrix.shape) or not energy:
        u, s, vt = np.linalg.svd(matrix.toarray() if is_sparse else matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    transposed = matrix.T.tocsr() if is_sparse else matrix.T
    if matrix.shape[0] < matrix.shape[1]:
        v, s, ut = _lanczos(transposed, matrix, rank)
        return ut.T, s, v.T
    return _lanczos(matrix, transposed, rank)


def _lanczos(tall: Any, wide: Any, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Do so by the eigenvectors of the smaller Gram matrix; ``wide`` is the transpose of ``tall``.

    scipy's ``svds`` does the same, but gives ARPACK no generator of its own: a matrix of lower rank makes it draw new directions, and
    these would differ from call to call.
    """
    draw = np.random.Generator(np.random.Philox(0))
    gram = LinearOperator((tall.shape[1], tall.shape[1]), matvec=lambda x: wide @ (tall @ x), dtype=np.dtype(np.float64))
    _, basis = eigsh(gram, k=rank, v0=draw.standard_normal(tall.shape[1]), tol=_TOLERANCE, rng=draw)
    basis, _ = np.linalg.qr(basis)  # of close eigenvalues ARPACK's vectors are not quite orthogonal
    u, s, wt = np.linalg.svd(tall @ basis, full_matrices=False)
    return u, s, wt @ basis.T


def fix_signs(u_OR: np.ndarray, s_R: np.ndarray, vt_RI: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the largest entry of each right vector positive: the SVD leaves the sign of each pair open."""
    signs_R = np.sign(vt_RI[np.arange(len(s_R)), np.abs(vt_RI).argmax(axis=1)])
    signs_R[signs_R == 0] = 1
    return u_OR * signs_R, s_R, vt_RI * signs_R[:, None]
