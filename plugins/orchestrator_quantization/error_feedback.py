"""Quantizing column by column, while the columns that are still to come make up for the error.

The form of GPTQ that Chee et al. 2023 call LDLQ (arXiv:2307.13304, eq. 2; theorem 6 proves them equal): with the
damped H = A diag(r^2) A^T, A unit upper triangular, column k is rounded to the grid point nearest to

    W_k + sum_{j<k} (W - W^)_j A_jk.

Only finished errors are read and nothing behind the current column is written, so there is half the memory traffic of
the usual form (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), and H is never inverted. What rounding adds,
eta = target - point, gives the loss: tr(D H D^T) = sum_k r_k^2 |eta_k|^2.

Works on the transposed weight, so that a column of the paper is a contiguous row here.

Shape legend: I = in features (in the order in which they are quantized), O = out features, S = columns of a segment,
B = columns of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator_quantization.column_grids import StaticGrids, UpdatedGrids

if TYPE_CHECKING:
    import torch


def quantize_columns(
    weight_IO: torch.Tensor,
    unit_lower_II: torch.Tensor,
    pivots_I: torch.Tensor,
    zero_IO: torch.Tensor | None,
    grids: UpdatedGrids | StaticGrids,
    *,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the integers [I, O] as int8, and per row of the layer [O] the loss and the squared error.

    weight_IO: float32. unit_lower_II, pivots_I: A^T and r^2. zero_IO: entries that must become exactly zero, or None
    if there are none; their error is fed back like any other. grids: told of each segment of columns before its first
    column is rounded, with its weights as GPTQ has updated them by then.
    """
    import torch

    num_in, num_out = weight_IO.shape
    q_IO = torch.empty(num_in, num_out, dtype=torch.int8, device=weight_IO.device)
    error_IO = torch.empty_like(weight_IO)
    loss_O = torch.zeros(num_out, device=weight_IO.device)
    weights_I = pivots_I.float()
    for first, stop in grids.segments:
        target_SO = weight_IO[first:stop].clone()
        if first:
            target_SO.addmm_(unit_lower_II[first:stop, :first], error_IO[:first])
        if isinstance(grids, UpdatedGrids):
            grids.enter(first, _updated(weight_IO[first:stop], target_SO, unit_lower_II[first:stop, first:stop]))
        for start in range(first, stop, block_size):
            end = min(start + block_size, stop)
            target_BO = target_SO[start - first : end - first]
            if start > first:
                target_BO.addmm_(unit_lower_II[start:end, first:start], error_IO[first:start])
            feedback_BB = unit_lower_II[start:end, start:end].contiguous()
            for column in range(start, end):
                target_O = target_BO[column - start]
                if column > start:
                    target_O.addmv_(error_IO[start:column].T, feedback_BB[column - start, : column - start])
                grid = grids.of(column)
                q_O, point_O = grid.nearest(target_O)
                if zero_IO is not None:
                    zero_O = zero_IO[column]
                    q_O = torch.where(zero_O, grid.zero_point_X, q_O)
                    point_O.masked_fill_(zero_O, 0.0)
                q_IO[column] = q_O
                torch.sub(weight_IO[column], point_O, out=error_IO[column])
                target_O.sub_(point_O)
            loss_O.addmv_(target_BO.square_().T, weights_I[start:end])
    return q_IO, loss_O, error_IO.square_().sum(0)


def _updated(weight_SO: torch.Tensor, target_SO: torch.Tensor, unit_lower_SS: torch.Tensor) -> torch.Tensor:
    """Return a segment's weights as the usual form of GPTQ has updated them when it comes to the segment.

    They are those that make up best for the errors F so far: (D A)_S = D_F A_FS + D_S A_SS = 0, hence
    W_S - D_S = W_S + D_F A_FS A_SS^-1, where D_F A_FS is what `target_SO` has beyond the weight.
    """
    import torch

    fed_back_SO = target_SO - weight_SO
    made_up_SO: torch.Tensor = torch.linalg.solve_triangular(
        unit_lower_SS, fed_back_SO, upper=False, unitriangular=True
    )
    return made_up_SO.add_(weight_SO)
