"""The triangular factor of a damped H that every second-order method works with.

H + damping * mean(diag H) * 1 = R R^T with R upper triangular, in float64, is kept as R = A diag(r) with A unit upper
triangular. What the methods need of H^-1 = U^T U follows from it without inverting anything: U_ii = 1 / r_i, so the
saliency of SparseGPT is w_i^2 r_i^2 (arXiv:2301.00774, eq. 4); and the updates of GPTQ, W_{:,j>i} -= e_i U_{i,j},
are for column k in all W_k + (W - W^)_{:,<k} A_{<k,k} (LDLQ: Chee et al. 2023, arXiv:2307.13304, eq. 2 and theorem 6).
One Cholesky instead of the usual Cholesky, inverse and Cholesky. The factor depends on H, the damping and the order
of the features, not on bits, groups, sparsity or the weight, so one serves all layers and methods that share H.

Shape legend: I = in features, B = features of a panel, J = features before it, X = some rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from orchestrator.parallel import in_parallel

if TYPE_CHECKING:
    import torch

Order = Literal["given", "falling"]
# How often damping is raised tenfold before giving up.
MAX_RAISES = 5
_PANEL = 256  # features factored at a time; decides the order of sums


@dataclass(frozen=True)
class HessianFactor:
    """The factor of H / n after features were put into order, normalized by `mean`.

    unit_lower_II: A^T, float32: row k weighs the errors of features before k. pivots_I: r^2, float64.
    order_I: the feature at each place, int64; None if the order is the given one.
    dead_I: features that never occurred (H_jj = 0), in the given order, bool. They got H_jj = 1 after normalization,
        which leaves them without influence on the others.
    mean: mean of the diagonal of H / n over live features; damping: share of it that was added to the diagonal;
    num_raised: how often that had to be raised tenfold.
    """

    unit_lower_II: torch.Tensor
    pivots_I: torch.Tensor
    order_I: torch.Tensor | None
    dead_I: torch.Tensor
    mean: float
    damping: float
    num_raised: int

    def undamped(self, loss_O: torch.Tensor, squares_O: torch.Tensor) -> torch.Tensor:
        """Return the error per token in the output, by row [O], float64, of a change D of the weight.

        loss_O: tr(D A diag(r^2) A^T D^T) by row; squares_O: |D|^2 by row, of which damping added its share.
        """
        return self.mean * (loss_O.double() - self.damping * squares_O.double()).clamp_(min=0)

    def to(self, device: torch.device) -> HessianFactor:
        """Return the factor on a device."""
        if self.pivots_I.device == device:
            return self
        order_I = None if self.order_I is None else self.order_I.to(device)
        moved = [tensor.to(device) for tensor in (self.unit_lower_II, self.pivots_I, self.dead_I)]
        return replace(self, unit_lower_II=moved[0], pivots_I=moved[1], dead_I=moved[2], order_I=order_I)


def _parts(num_rows: int) -> list[slice]:
    """Rows that are worked on beside each other; which they are may not depend on the machine."""
    half = num_rows // 2
    return [slice(0, half), slice(half, num_rows)] if num_rows >= 2 * _PANEL else [slice(0, num_rows)]


def _subtract(panel_XB: torch.Tensor, before_XJ: torch.Tensor, row_BJ: torch.Tensor) -> None:
    panel_XB.addmm_(before_XJ, row_BJ.T, alpha=-1)


def _divide(below_XB: torch.Tensor, corner_BB: torch.Tensor) -> None:
    import torch

    below_XB.copy_(torch.linalg.solve_triangular(corner_BB.T, below_XB, upper=True, left=False))


def factorize(hessian_II: torch.Tensor, num_tokens: int, damping: float, order: Order) -> HessianFactor | None:
    """Return the factor, or None if H is not positive definite even with damping * 10^5.

    hessian_II: H = X^T X, float32 or float64, finite; only its lower triangle is read. Its diagonal must not be
    negative, nor zero everywhere. order: "falling" sorts by H_jj (of equal ones the lower index first).
    """

    diagonal_I = hessian_II.diagonal().double() / num_tokens
    dead_I = diagonal_I == 0
    mean = float(diagonal_I[~dead_I].mean())
    order_I = diagonal_I.argsort(descending=True, stable=True) if order == "falling" else None
    for num_raised in range(MAX_RAISES + 1):
        used = damping * 10.0**num_raised
        # With P the reversal of the order, P H P = L L^T gives R = P L P.
        lower_II = _reversed(hessian_II, order_I).div_(num_tokens * mean)
        reversed_dead_I = (dead_I if order_I is None else dead_I[order_I]).flip(0)
        lower_II.diagonal()[reversed_dead_I] = 1.0
        lower_II.diagonal().add_(used)
        if cholesky_(lower_II):
            break
    else:
        return None
    scale_I = lower_II.diagonal().clone()
    unit_lower_II = _unit_lower(lower_II, scale_I)
    return HessianFactor(unit_lower_II, scale_I.flip(0).square(), order_I, dead_I, mean, used, num_raised)


def _reversed(hessian_II: torch.Tensor, order_I: torch.Tensor | None) -> torch.Tensor:
    """Return H in float64 with features in reversed order; its upper triangle holds nothing of use."""
    import torch

    num = len(hessian_II)
    if order_I is not None:
        lower_II = hessian_II.tril()
        symmetric_II = lower_II.add_(torch.tril(lower_II, -1).T)
        back_I = order_I.flip(0)
        return symmetric_II[back_I][:, back_I].double()
    reversed_II = torch.empty_like(hessian_II, dtype=torch.float64)
    for start in range(0, num, _PANEL):  # by strips, so that nothing of this size is copied twice
        end = min(start + _PANEL, num)
        # The lower triangle of the reversal is the upper one of H, which may not be filled.
        reversed_II[start:end] = hessian_II[:, num - end : num - start].T.flip(0, 1)
    return reversed_II


def _unit_lower(lower_II: torch.Tensor, scale_I: torch.Tensor) -> torch.Tensor:
    """Return A^T in float32 from the factor L of the reversed H: A = P L diag(scale)^-1 P."""
    import torch

    num = len(scale_I)
    unit_lower_II = torch.empty_like(lower_II, dtype=torch.float32)
    for start in range(0, num, _PANEL):
        end = min(start + _PANEL, num)
        unit_lower_II[:, num - end : num - start] = (lower_II[start:end] / scale_I).flip(0, 1).T
    return unit_lower_II


def cholesky_(matrix_II: torch.Tensor) -> bool:
    """Replace a matrix by its lower Cholesky factor, zero above the diagonal; False if it is not positive definite.

    Reads the lower triangle only. In place, so that nothing is held twice; panel by panel, left-looking.
    """
    import torch

    num = len(matrix_II)
    faults = torch.zeros((), dtype=torch.int32, device=matrix_II.device)  # looked at once: an accelerator must not wait
    for start in range(0, num, _PANEL):
        end = min(start + _PANEL, num)
        panel_IB = matrix_II[start:, start:end]
        if start:
            before_IJ, row_BJ = matrix_II[start:, :start], matrix_II[start:end, :start]
            in_parallel([partial(_subtract, panel_IB[part], before_IJ[part], row_BJ) for part in _parts(num - start)])
        corner_BB, info = torch.linalg.cholesky_ex(panel_IB[: end - start])
        faults += info
        panel_IB[: end - start] = corner_BB
        if end < num:
            below_IB = panel_IB[end - start :]
            in_parallel([partial(_divide, below_IB[part], corner_BB) for part in _parts(num - end)])
        matrix_II[start:end, end:] = 0
    return int(faults) == 0 and bool(matrix_II.diagonal().isfinite().all())
