"""Changing a layer column by column, while the columns that are still to come make up for the error.

What GPTQ and SparseGPT do, in the form that Chee et al. 2023 call LDLQ (arXiv:2307.13304, eq. 2; theorem 6 proves it
equal to the usual form of Frantar et al. 2022, arXiv:2210.17323, algorithm 1): with the damped H = A diag(r^2) A^T, A
unit upper triangular, column k is what a rule makes of the target

    W_k + sum_{j<k} (W - W^)_j A_jk.

Only finished errors are read and nothing behind the current column is written, so there is half the memory traffic of
the usual form, and H is never inverted. What the rule adds, eta = target - result, gives the loss:
tr(D H D^T) = sum_k r_k^2 |eta_k|^2.

Works on the transposed weight, so that a column of the papers is a contiguous row here.

Shape legend: I = in features (in the order in which they are taken), O = out features, S = columns of a segment,
B = columns of a block, M = columns that are looked at together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from orchestrator.nm import run_of

if TYPE_CHECKING:
    import torch


class ColumnRule(Protocol):
    """What becomes of each column.

    segments: [start, end) of columns that together cover all; they decide the order of sums. entries: columns before
    which `enter` is called.
    """

    @property
    def segments(self) -> Sequence[tuple[int, int]]: ...

    @property
    def entries(self) -> Collection[int]: ...

    def enter(self, column: int, updated: Callable[[int], torch.Tensor]) -> None:
        """Look at what comes: `updated(M)` gives the next M columns [M, O] as the usual form has updated them."""

    def result(self, column: int, target_O: torch.Tensor) -> torch.Tensor:
        """Return what the column becomes [O]; its own tensor."""


@dataclass(frozen=True)
class SolvedColumns:
    """loss_O: the damped loss tr(D H D^T) by row of the layer. squares_O: the squared change by row."""

    loss_O: torch.Tensor
    squares_O: torch.Tensor


def solve_columns(
    weight_IO: torch.Tensor,
    unit_lower_II: torch.Tensor,
    pivots_I: torch.Tensor,
    rule: ColumnRule,
    *,
    block_size: int,
) -> SolvedColumns:
    """Take column after column, and let `rule` say what becomes of it; the rule keeps the results.

    weight_IO: float32. unit_lower_II, pivots_I: A^T and r^2. block_size: columns that one product feeds back into.
    """
    import torch

    error_IO = torch.empty_like(weight_IO)
    loss_O = torch.zeros(weight_IO.shape[1], device=weight_IO.device)
    weights_I = pivots_I.float()
    for first, stop in rule.segments:
        target_SO = weight_IO[first:stop].clone()
        if first:
            target_SO.addmm_(unit_lower_II[first:stop, :first], error_IO[:first])
        for start in range(first, stop, block_size):
            end = min(start + block_size, stop)
            target_BO = target_SO[start - first : end - first]
            if start in rule.entries and start == first:
                rule.enter(start, _Ahead(weight_IO, unit_lower_II, error_IO, start, target_SO))
            if start > first:
                target_BO.addmm_(unit_lower_II[start:end, first:start], error_IO[first:start])
            feedback_BB = unit_lower_II[start:end, start:end].contiguous()
            error_OB = error_IO[start:end].T
            # Views are made once for all: making one takes as long as the arithmetic of a short column.
            rows = zip(target_BO.unbind(), weight_IO[start:end].unbind(), error_IO[start:end].unbind(), strict=True)
            for place, (target_O, weight_O, error_O) in enumerate(rows):
                column = start + place
                if column in rule.entries and column != first:
                    rule.enter(column, _Ahead(weight_IO, unit_lower_II, error_IO, column, None))
                if place:
                    target_O.addmv_(error_OB[:, :place], feedback_BB[place, :place])
                result_O = rule.result(column, target_O)
                torch.sub(weight_O, result_O, out=error_O)
                target_O.sub_(result_O)
            loss_O.addmv_(target_BO.square_().T, weights_I[start:end])
    return SolvedColumns(loss_O, error_IO.square_().sum(0))


@dataclass(frozen=True)
class _Ahead:
    """The columns from `column` on, updated by the errors so far. target_SO: those already computed, if any."""

    weight_IO: torch.Tensor
    unit_lower_II: torch.Tensor
    error_IO: torch.Tensor
    column: int
    target_SO: torch.Tensor | None

    def __call__(self, count: int) -> torch.Tensor:
        """Return `count` columns [M, O] as the usual form has updated them.

        They are those that make up best for the errors F so far: (D A)_M = D_F A_FM + D_M A_MM = 0, hence
        W_M - D_M = W_M + D_F A_FM A_MM^-1, where D_F A_FM is what the target has beyond the weight.
        """
        import torch

        first, stop = self.column, min(self.column + count, len(self.weight_IO))
        weight_MO = self.weight_IO[first:stop]
        if self.target_SO is not None and len(self.target_SO) >= stop - first:
            fed_back_MO = self.target_SO[: stop - first] - weight_MO
        else:
            fed_back_MO = self.unit_lower_II[first:stop, :first] @ self.error_IO[:first]
        made_up_MO: torch.Tensor = torch.linalg.solve_triangular(
            self.unit_lower_II[first:stop, first:stop], fed_back_MO, upper=False, unitriangular=True
        )
        return made_up_MO.add_(weight_MO)


class SaliencyMask:
    """Which weights become zero: those with the lowest w^2 / [U_ii]^2 = w^2 r^2, as updated by then.

    The saliency of optimal brain surgeon in a fixed order (SparseGPT: Frantar and Alistarh 2023, arXiv:2301.00774,
    eq. 4). pattern: "block": the share `sparsity` of `block_size` columns, over all rows together; "n:m": all but n of
    every m columns, row by row. Weights that are zero already go first, and all of them stay zero.
    """

    def __init__(
        self, weight_IO: torch.Tensor, pivots_I: torch.Tensor, pattern: str, sparsity: float, block_size: int
    ) -> None:
        self.zero_IO = weight_IO == 0  # what is known by now
        self._given_IO = self.zero_IO.clone()
        self._pivots_I = pivots_I.float()
        self._share = sparsity
        run = run_of(pattern)
        self._kept = run[0] if run else None
        self.width = run[1] if run else block_size  # columns that are chosen among at a time

    def choose(self, column: int, updated: Callable[[int], torch.Tensor]) -> None:
        """Choose among the `width` columns from `column` on."""
        import torch

        updated_MO = updated(self.width)
        chosen = slice(column, column + len(updated_MO))
        given_MO = self._given_IO[chosen]
        score_MO = updated_MO.square_().mul_(self._pivots_I[chosen, None]).masked_fill_(given_MO, -1.0)
        if self._kept is None:
            score_X = score_MO.flatten()
            count = math.floor(self._share * len(score_X) + 1e-9)  # 0.29 of 100 is 29
            removed_MO = lowest(score_X, count).view_as(score_MO)
        else:
            removed_MO = lowest(score_MO.T, self.width - self._kept).T
        torch.logical_or(removed_MO, given_MO, out=self.zero_IO[chosen])


def lowest(score_XS: torch.Tensor, count: int) -> torch.Tensor:
    """Mark exactly `count` lowest scores along the last dimension, [X..., S] bool; of equal ones the lower index.

    Selection instead of sorting: linear in S. Scores must not be NaN. Shape legend: S = scores that compete.
    """
    import torch

    if count == 0:
        return torch.zeros_like(score_XS, dtype=torch.bool)
    threshold_X1 = score_XS.kthvalue(count, dim=-1, keepdim=True).values
    below_XS = score_XS < threshold_X1
    tied_XS = score_XS == threshold_X1
    num_tied_wanted_X1 = count - below_XS.sum(-1, keepdim=True)
    if bool((tied_XS.sum(-1, keepdim=True) > num_tied_wanted_X1).any()):
        tied_XS &= tied_XS.cumsum(-1) <= num_tied_wanted_X1
    return below_XS | tied_XS


class Removal:
    """The rule of SparseGPT: what the mask removes becomes zero, the rest stays as updated. `kept_IO`: the results."""

    def __init__(self, weight_IO: torch.Tensor, mask: SaliencyMask, block_size: int) -> None:
        import torch

        num_in = len(weight_IO)
        self.segments = [(start, min(start + block_size, num_in)) for start in range(0, num_in, block_size)]
        self.entries = range(0, num_in, mask.width)
        self.kept_IO = torch.empty_like(weight_IO)
        self._mask = mask

    def enter(self, column: int, updated: Callable[[int], torch.Tensor]) -> None:
        """Choose what goes."""
        self._mask.choose(column, updated)

    def result(self, column: int, target_O: torch.Tensor) -> torch.Tensor:
        """Return the target with zeros in place of what goes."""
        kept_O = target_O.masked_fill(self._mask.zero_IO[column], 0.0)
        self.kept_IO[column] = kept_O
        return kept_O
