"""The triangular factor of the inverse of H that error propagation is made of.

U is upper triangular with U^T U = (H + damping * mean(diag H) * 1)^-1, computed in float64: with P the reversal of
the index order, P H P = L L^T gives H = R R^T with R = P L P upper triangular, so U = R^-1. One Cholesky and one
triangular inverse instead of the usual Cholesky, full inverse and second Cholesky: half the work, less rounding.
H is normalized by its mean diagonal first; the factor of a multiple of H leads to the same quantized weights.

Shape legend: I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# How often damping is raised tenfold before giving up.
MAX_RAISES = 5


@dataclass(frozen=True)
class InverseFactor:
    """U [I, I] float32, the damping with which it was found, and how often that had to be raised tenfold."""

    upper_II: torch.Tensor
    damping: float
    num_raised: int


def inverse_factor(hessian_II: torch.Tensor, damping: float) -> InverseFactor | None:
    """Return the factor, or None if H is not positive definite even with damping * 10^5.

    hessian_II: float64, finite, symmetric, with a positive mean of the diagonal. Input features that never occurred
    (H_jj = 0) get H_jj = 1 after normalization, which leaves them without influence on the others.
    """
    import torch

    diagonal_I = hessian_II.diagonal()
    live_I = diagonal_I != 0
    normal_II = hessian_II / diagonal_I[live_I].mean()
    normal_II.diagonal()[~live_I] = 1.0
    identity_II = torch.eye(len(diagonal_I), dtype=hessian_II.dtype, device=hessian_II.device)
    for num_raised in range(MAX_RAISES + 1):
        used = damping * 10.0**num_raised
        reversed_II = (normal_II + used * identity_II).flip(0, 1)
        lower_II, info = torch.linalg.cholesky_ex(reversed_II)
        if int(info) == 0 and bool(lower_II.isfinite().all()):
            upper_II = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
            return InverseFactor(upper_II.float().contiguous(), used, num_raised)
    return None
