"""Quantizing column by column, while the columns that are still to come make up for the error.

Works on the transposed weight, so that a column of the paper is a contiguous row here. Updates reach the current
block of columns at once and the columns behind it when the block is done (Frantar et al. 2022, arXiv:2210.17323,
algorithm 1). Blocks never straddle a group, so that a group's scales see all updates of the columns before it.

Shape legend: I = in features (in the order in which they are quantized), O = out features, B = columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from orchestrator_quantization.grid import Grid

if TYPE_CHECKING:
    import torch


def quantize_columns(
    weight_IO: torch.Tensor,
    upper_II: torch.Tensor,
    zero_IO: torch.Tensor | None,
    grid_of: Callable[[int, torch.Tensor], Grid],
    *,
    block_size: int,
    group_width: int,
) -> torch.Tensor:
    """Return the integers [I, O] as int8.

    weight_IO: float32; overwritten. upper_II: U with U^T U = H^-1. zero_IO: entries that must become exactly zero,
    or None if there are none; their error is propagated like any other.
    grid_of(column, weight_IO): the grid [O] of a column, asked for once, when every update due to it is done.
    """
    import torch

    num_in, num_out = weight_IO.shape
    q_IO = torch.empty(num_in, num_out, dtype=torch.int8, device=weight_IO.device)
    pivots = upper_II.diagonal().tolist()
    for start, end in blocks(num_in, block_size, group_width):
        error_BO = torch.empty(end - start, num_out, device=weight_IO.device)
        block_BO = weight_IO[start:end]
        upper_BB = upper_II[start:end, start:end]
        for column in range(end - start):
            grid = grid_of(start + column, weight_IO)
            weight_O = block_BO[column]
            q_O, point_O = grid.nearest(weight_O)
            if zero_IO is not None:
                zero_O = zero_IO[start + column]
                q_O = torch.where(zero_O, grid.zero_point_X, q_O)
                point_O.masked_fill_(zero_O, 0.0)
            error_O = (weight_O - point_O).div_(pivots[start + column])
            block_BO[column + 1 :].addr_(upper_BB[column, column + 1 :], error_O, alpha=-1)
            q_IO[start + column] = q_O
            error_BO[column] = error_O
        weight_IO[end:].addmm_(upper_II[start:end, end:].T, error_BO, alpha=-1)
    return q_IO


def blocks(num_in: int, block_size: int, group_width: int) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of blocks of at most `block_size` columns (or one group) that no group boundary cuts badly.

    Small groups: as many whole groups as fit. Large groups: each is cut into blocks of its own.
    """
    if group_width <= block_size:
        width = block_size // group_width * group_width
        yield from ((start, min(start + width, num_in)) for start in range(0, num_in, width))
        return
    for group in range(0, num_in, group_width):
        stop = min(group + group_width, num_in)
        yield from ((start, min(start + block_size, stop)) for start in range(group, stop, block_size))
