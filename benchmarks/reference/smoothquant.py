"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, eq. 4): W8A8 after moving spread from inputs into weights.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), |W_j| over all layers that read X; X / s is what the norm, or the layer
before, puts out when divided by s; W becomes W s. Weights are rounded with one scale per output channel, inputs while
the model runs, with one scale per token (dynamic) or one per layer from the calibration (static).

Choices: inputs are those of the uncompressed model; what down reads is smoothed too, through up, and what o reads
through v where heads are not shared; scales are 2 max / 255, so that -128 is used; those of weights and of static
inputs are rounded to the stored dtype; those of tokens are float32. A weight is its integer times its scale and is not
rounded again, since kernels multiply the sums of integers.

Shape legend: T = tokens, O = out features, I = in features, X = any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.reference import folding, grids
from benchmarks.reference.model import STAGES, Blocks, each_layer, layers_of

BITS = 8


def quantize_inputs(layer: nn.Module, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a layer see its inputs rounded."""
    layer.register_forward_pre_hook(lambda module, args: (quantize(args[0]), *args[1:]))


def by_token(input_XI: torch.Tensor) -> torch.Tensor:
    """Return the inputs [X, I] rounded with one scale for each token."""
    scale_X1 = 2 * input_XI.abs().amax(-1, keepdim=True) / (2**BITS - 1)
    scale_X1 = torch.where(scale_X1 == 0, 1.0, scale_X1)
    return torch.round(input_XI / scale_X1).clamp(-128, 127) * scale_X1


def by_tensor(scale: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that rounds inputs with one scale for all."""
    return lambda input_XI: torch.round(input_XI / scale.to(input_XI)).clamp(-128, 127) * scale.to(input_XI)


def compress(
    model: Any,
    tokens_NT: torch.Tensor,
    *,
    static: bool = False,
    alpha: float = 0.5,
    skip: Sequence[str] = (),
) -> None:
    """Smooth and quantize in place; layers quantize their inputs from then on."""
    blocks = Blocks(model, tokens_NT)
    largest: list[dict[tuple[str, ...], torch.Tensor]] = []
    for block in model.model.layers:
        largest.append({stage: blocks.inputs(block, stage).abs().amax(0) for stage in STAGES})
        blocks.go_on(block)
    for block, largest_I in zip(model.model.layers, largest, strict=True):
        scales = {}
        for stage in STAGES:
            layers = layers_of(block, stage, skip)
            if len(layers) == len(stage) and folding.producer(model, block, stage) is not None:
                weight_I = torch.cat([layer.weight.data.abs() for layer in layers.values()]).amax(0)
                scale_I = largest_I[stage] ** alpha / weight_I ** (1 - alpha)
                scales[stage] = torch.where((largest_I[stage] > 0) & (weight_I > 0), scale_I, 1.0)
        for stage, chosen_I in scales.items():
            scale_I = folding.divide(model, folding.producer(model, block, stage), chosen_I)
            largest_I[stage] = largest_I[stage] / scale_I
            for name in stage:
                block.get_submodule(name).weight.data *= scale_I
        for stage in STAGES:
            for layer in layers_of(block, stage, skip).values():
                scale = (2 * largest_I[stage].max() / (2**BITS - 1)).to(model.stored_dtype).to(model.dtype)
                quantize_inputs(layer, by_tensor(scale) if static else by_token)
    setting = grids.Setting(BITS, None, True, model.stored_dtype)
    for layer in each_layer(model, skip):
        scale_O1, zero_O1 = grids.fit(layer.weight.data, setting)
        layer.weight.data = grids.integers(layer.weight.data, scale_O1, zero_O1, setting) * scale_O1
