"""GPTQ (Frantar et al. 2022, arXiv:2210.17323, eq. 2-3 and algorithm 1), column by column without lazy batches.

H = 2 X^T X; H += 1 % of its mean diagonal; U upper triangular with U^T U = H^-1 (its Cholesky factor). For column i:
e = (w_i - q_i) / U_ii; W_{:, i:} -= e U_{i, i:}. The grid of a group is fitted to the weights as they have been updated
when its first column is reached (section 4, "grouping").

Choices: columns in their own order; an input that never occurs gets weight 0; weights that are 0 stay so.

Shape legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.reference import grids
from benchmarks.reference.model import compress_in_turn

DAMPING = 0.01


def inverse_factor(input_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U [I, I], and which inputs never occur [I]."""
    hessian_II = (2 * input_TI.T @ input_TI).double()
    dead_I = hessian_II.diagonal() == 0
    mean = hessian_II.diagonal().mean()
    hessian_II = hessian_II + torch.diag(DAMPING * mean + dead_I.double())
    inverse_II = torch.linalg.inv(hessian_II)
    return torch.linalg.cholesky((inverse_II + inverse_II.T) / 2, upper=True).to(input_TI.dtype), dead_I


def quantize(weight_OI: torch.Tensor, input_TI: torch.Tensor, *, setting: grids.Setting) -> torch.Tensor:
    """Return the quantized weight."""
    upper_II, dead_I = inverse_factor(input_TI)
    zero_OI = (weight_OI == 0) | dead_I
    weight_OI = weight_OI.masked_fill(dead_I, 0.0)
    num_in = weight_OI.shape[1]
    width = setting.group or num_in
    result_OI = torch.zeros_like(weight_OI)
    for i in range(num_in):
        if i % width == 0:
            known_OW = weight_OI[:, i : i + width].masked_fill(zero_OI[:, i : i + width], 0.0)
            scale_O1, zero_O1 = grids.fit(known_OW, setting)
        column_O1 = weight_OI[:, i : i + 1]
        point_O1 = grids.nearest(column_O1, scale_O1, zero_O1, setting).masked_fill(zero_OI[:, i : i + 1], 0.0)
        error_O1 = (column_O1 - point_O1) / upper_II[i, i]
        weight_OI[:, i:] -= error_O1 * upper_II[i, i:]
        result_OI[:, i : i + 1] = point_O1
    return result_OI


def compress(
    model: Any,
    tokens_NT: torch.Tensor,
    *,
    num_bits: int,
    group: int | None,
    symmetric: bool = True,
    skip: Sequence[str] = (),
) -> None:
    """Quantize in place."""
    setting = grids.Setting(num_bits, group, symmetric, model.stored_dtype)
    compress_in_turn(model, tokens_NT, partial(quantize, setting=setting), skip)
