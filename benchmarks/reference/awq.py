"""AWQ (Lin et al. 2023, arXiv:2306.00978): scales searched on outputs (eq. 4 and 5), then clipped ranges (section 4.1).

For the layers that read X together: s = x^a / w^(1 - a), x the mean |X_j|, w the mean over rows of |W_ij| / (largest of
its group) (the authors' `duo_scaling`), s /= sqrt(max s min s); a in {0, 0.05, ..., 0.95} with the least
|| Q(W s) / s X - W X ||^2. s = 1 is tried too. Then, for each group of each row, the share of the range in
{1, 0.95, ..., 0.5} with the least squared error in the output that the group contributes.

Choices: all tokens are used for both searches; ranges of q and k are clipped too; the output is that of the layers, not
of the attention behind them; all stages of a block are measured on the block as it was before.

Shape legend: T = tokens, O = out features, I = in features, G = groups, W = width of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.reference import folding, grids
from benchmarks.reference.model import STAGES, Blocks, layers_of, store

ALPHAS, SHARES = 20, 10
SMALLEST = 1e-4


def search_scale(weights: list[torch.Tensor], input_TI: torch.Tensor, setting: grids.Setting) -> torch.Tensor:
    """Return s [I]."""
    size_I = input_TI.abs().mean(0).clamp(min=SMALLEST)
    all_OGW = setting.split(torch.cat(weights).abs())
    largest_OG1 = all_OGW.amax(-1, keepdim=True)
    weight_I = (all_OGW / torch.where(largest_OG1 > 0, largest_OG1, 1.0)).mean(0).flatten()
    candidates = [torch.ones_like(size_I)]
    for k in range(ALPHAS):
        scale_I = (size_I ** (k / ALPHAS) / (weight_I ** (1 - k / ALPHAS) + SMALLEST)).clamp(min=SMALLEST)
        candidates.append(scale_I / (scale_I.max() * scale_I.min()).sqrt())

    def error(scale_I: torch.Tensor) -> float:
        total = 0.0
        for weight_OI in weights:
            difference_OI = grids.round_to_nearest(weight_OI * scale_I, setting) / scale_I - weight_OI
            total += float((input_TI @ difference_OI.T).square().sum())
        return total

    return min(candidates, key=error)


def clip(weight_OI: torch.Tensor, input_TI: torch.Tensor, setting: grids.Setting) -> torch.Tensor:
    """Return the weight rounded in the best range of each group."""
    weight_OGW = setting.split(weight_OI)
    input_GTW = input_TI.reshape(len(input_TI), -1, weight_OGW.shape[2]).transpose(0, 1)
    best_OGW, least_OG = None, torch.full(weight_OGW.shape[:2], torch.inf, dtype=weight_OI.dtype)
    for k in range(SHARES + 1):
        rounded_OGW = grids.nearest(weight_OGW, *grids.fit(weight_OGW, setting, 1 - 0.5 * k / SHARES), setting)
        difference_GWO = (rounded_OGW - weight_OGW).permute(1, 2, 0)
        error_OG = torch.stack(
            [(x_TW @ d_WO).square().sum(0) for x_TW, d_WO in zip(input_GTW, difference_GWO, strict=True)], 1
        )
        better_OG = error_OG < least_OG
        best_OGW = rounded_OGW if best_OGW is None else torch.where(better_OG[..., None], rounded_OGW, best_OGW)
        least_OG = torch.minimum(error_OG, least_OG)
    assert best_OGW is not None
    return best_OGW.reshape(weight_OI.shape)


def compress(
    model: Any,
    tokens_NT: torch.Tensor,
    *,
    num_bits: int,
    group: int | None,
    symmetric: bool = False,
    skip: Sequence[str] = (),
) -> None:
    """Scale, clip and quantize in place."""
    setting = grids.Setting(num_bits, group, symmetric, model.stored_dtype)
    blocks = Blocks(model, tokens_NT)
    for block in model.model.layers:
        inputs = {stage: blocks.inputs(block, stage) for stage in STAGES}
        scales = {}
        for stage in STAGES:
            layers = layers_of(block, stage, skip)
            if len(layers) == len(stage) and folding.producer(model, block, stage) is not None:
                scales[stage] = search_scale([layer.weight.data for layer in layers.values()], inputs[stage], setting)
        for stage, chosen_I in scales.items():
            scale_I = folding.divide(model, folding.producer(model, block, stage), chosen_I)
            inputs[stage] = inputs[stage] / scale_I
            for name in stage:
                block.get_submodule(name).weight.data *= scale_I
        for stage in STAGES:
            for layer in layers_of(block, stage, skip).values():
                store(model, layer, clip(layer.weight.data, inputs[stage], setting))
        blocks.go_on(block)
