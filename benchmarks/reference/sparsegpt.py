"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1), and its joint solve with GPTQ (section 3.5).

U as in GPTQ. Before each block of 128 columns, the half of its weights with the lowest w^2 / U_ii^2 (eq. 4) is marked,
over all rows together, or before each 4 columns the 2 lowest of each row (2:4). A marked weight becomes 0, in the joint
solve any other its grid point; e = (w_i - result) / U_ii; W_{:, i:} -= e U_{i, i:}.

Choices: in the joint solve a group's grid is fitted to what is not marked by then; one after the other (SparseGPT, then
GPTQ that leaves the zeros alone) is solved too, and the one with the smaller || X D^T ||^2 is kept, layer by layer.

Shape legend: T = tokens, O = out features, I = in features, B = columns that are marked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.reference import gptq, grids
from benchmarks.reference.model import compress_in_turn

BLOCK = 128


def mark(weight_OB: torch.Tensor, diagonal_B: torch.Tensor, pattern: str | None) -> torch.Tensor:
    """Return which of the weights go [O, B]: half of all, or 2 of each row's 4."""
    saliency_OB = weight_OB**2 / diagonal_B**2
    if pattern == "2:4":
        lowest_O2 = saliency_OB.argsort(dim=1, stable=True)[:, :2]
        return torch.zeros_like(saliency_OB, dtype=torch.bool).scatter(1, lowest_O2, True)
    order_X = saliency_OB.flatten().argsort(stable=True)
    marked_X = torch.zeros(saliency_OB.numel(), dtype=torch.bool)
    marked_X[order_X[: len(order_X) // 2]] = True
    return marked_X.view_as(saliency_OB)


def solve(
    weight_OI: torch.Tensor, input_TI: torch.Tensor, *, pattern: str | None, setting: grids.Setting | None
) -> torch.Tensor:
    """Return the pruned weight; with a setting, the pruned and quantized one."""
    upper_II, dead_I = gptq.inverse_factor(input_TI)
    weight_OI = weight_OI.masked_fill(dead_I, 0.0)
    num_in = weight_OI.shape[1]
    at_once = 4 if pattern else BLOCK
    zero_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    result_OI = torch.zeros_like(weight_OI)
    for i in range(num_in):
        if i % at_once == 0:
            columns = slice(i, i + at_once)
            zero_OI[:, columns] = mark(weight_OI[:, columns], upper_II.diagonal()[columns], pattern)
        column_O1, zero_O1 = weight_OI[:, i : i + 1], zero_OI[:, i : i + 1]
        if setting is None:
            kept_O1 = column_O1
        else:
            width = setting.group or num_in
            if i % width == 0:
                columns = slice(i, i + width)
                grid = grids.fit(weight_OI[:, columns].masked_fill(zero_OI[:, columns], 0.0), setting)
            kept_O1 = grids.nearest(column_O1, *grid, setting)
        kept_O1 = kept_O1.masked_fill(zero_O1, 0.0)
        error_O1 = (column_O1 - kept_O1) / upper_II[i, i]
        weight_OI[:, i:] -= error_O1 * upper_II[i, i:]
        result_OI[:, i : i + 1] = kept_O1
    return result_OI


def solve_both(
    weight_OI: torch.Tensor, input_TI: torch.Tensor, *, pattern: str | None, setting: grids.Setting
) -> torch.Tensor:
    """Return the better of the joint solve and one after the other."""
    joint_OI = solve(weight_OI, input_TI, pattern=pattern, setting=setting)
    pruned_OI = solve(weight_OI, input_TI, pattern=pattern, setting=None)
    after_OI = gptq.quantize(pruned_OI, input_TI, setting=setting)
    joint, after = (float((input_TI @ (weight_OI - one_OI).T).square().sum()) for one_OI in (joint_OI, after_OI))
    return joint_OI if joint <= after else after_OI


def compress(
    model: Any,
    tokens_NT: torch.Tensor,
    *,
    pattern: str | None = None,
    num_bits: int | None = None,
    group: int | None = None,
    symmetric: bool = True,
    skip: Sequence[str] = (),
) -> None:
    """Prune half of every layer in place; with `num_bits`, quantize in the same solve."""
    if num_bits is None:
        change = partial(solve, pattern=pattern, setting=None)
    else:
        setting = grids.Setting(num_bits, group, symmetric, model.stored_dtype)
        change = partial(solve_both, pattern=pattern, setting=setting)
    compress_in_turn(model, tokens_NT, change, skip)
