"""HQQ: half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog). Needs no data.

Minimizes sum |W - s (q - z)|^p, p = 0.7, by turns: E = shrink(W - s (q - z)) with
shrink(r) = sign(r) max(|r| - |r|^(p - 1) / beta, 0); then z = mean(q - (W - E) / s); then q by rounding; beta, 10 at
first, grows by 1.01; 20 turns.

Choices: zero points are integers, as compressed-tensors stores them, so s = <W - E, q - z> / <q - z, q - z> is solved
for as well; r is measured in steps s; of all turns each group keeps the grid with the least error; the turns end when
no group gains.

Shape legend: O = out features, G = groups, W = width of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.reference import grids
from benchmarks.reference.model import each_layer, store

NORM, BETA, KAPPA, TURNS = 0.7, 10.0, 1.01, 20


def shrink(r: torch.Tensor, beta: float) -> torch.Tensor:
    """Return what of an error the norm forgives."""
    size = r.abs()
    less = size - torch.where(size > 0, size.clamp(min=torch.finfo(size.dtype).tiny) ** (NORM - 1), 0.0) / beta
    return torch.sign(r) * less.clamp(min=0)


def solve(weight_OGW: torch.Tensor, setting: grids.Setting) -> torch.Tensor:
    """Return the weight on the best grids found."""
    scale_OG1, zero_OG1 = grids.fit(weight_OGW, setting)
    q_OGW = grids.integers(weight_OGW, scale_OG1, zero_OG1, setting)
    best_OGW = grids.points(q_OGW, scale_OG1, zero_OG1, setting)
    point_OGW = best_OGW
    least_OG1 = ((weight_OGW - best_OGW).abs() ** NORM).sum(-1, keepdim=True)
    beta = BETA
    for _ in range(TURNS):
        target_OGW = weight_OGW - scale_OG1 * shrink((weight_OGW - point_OGW) / scale_OG1, beta)
        if not setting.symmetric:
            zero_OG1 = torch.round((q_OGW - target_OGW / scale_OG1).mean(-1, keepdim=True))
            zero_OG1 = zero_OG1.clamp(setting.lowest, setting.highest)
        level_OGW = q_OGW - zero_OG1
        energy_OG1 = (level_OGW**2).sum(-1, keepdim=True)
        solved_OG1 = (
            ((target_OGW * level_OGW).sum(-1, keepdim=True) / energy_OG1).to(setting.dtype).to(weight_OGW.dtype)
        )
        scale_OG1 = torch.where((energy_OG1 > 0) & (solved_OG1 > 0), solved_OG1, scale_OG1)
        q_OGW = grids.integers(weight_OGW, scale_OG1, zero_OG1, setting)
        point_OGW = grids.points(q_OGW, scale_OG1, zero_OG1, setting)
        error_OG1 = ((weight_OGW - point_OGW).abs() ** NORM).sum(-1, keepdim=True)
        better_OG1 = error_OG1 < least_OG1
        if not bool(better_OG1.any()):
            break
        best_OGW = torch.where(better_OG1, point_OGW, best_OGW)
        least_OG1 = torch.where(better_OG1, error_OG1, least_OG1)
        beta *= KAPPA
    return best_OGW


def compress(
    model: Any,
    tokens_NT: torch.Tensor,
    *,
    num_bits: int,
    group: int | None,
    symmetric: bool = False,
    skip: Sequence[str] = (),
) -> None:
    """Quantize in place."""
    setting = grids.Setting(num_bits, group, symmetric, model.stored_dtype)
    for layer in each_layer(model, skip):
        weight_OI = layer.weight.data
        store(model, layer, solve(setting.split(weight_OI), setting).reshape(weight_OI.shape))
