"""FP8 (Micikevicius et al. 2022, arXiv:2209.05433), E4M3: q = cast(w / s), s = max|w| / 448. Needs no data.

Weights with one scale per output channel, in the stored dtype; inputs, while the model runs, with one per token. A
weight is its float8 number times its scale and is not rounded again, since kernels multiply the sums.

Shape legend: O = out features, I = in features, X = any leading shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.reference.model import each_layer
from benchmarks.reference.smoothquant import quantize_inputs

LARGEST = 448.0


def cast(value: torch.Tensor) -> torch.Tensor:
    """Round to the nearest number of the format. Through float32: torch has no way from float64 to float8."""
    return value.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(value.dtype)


def by_token(input_XI: torch.Tensor) -> torch.Tensor:
    """Return the inputs rounded with one scale for each token."""
    scale_X1 = input_XI.abs().amax(-1, keepdim=True) / LARGEST
    scale_X1 = torch.where(scale_X1 == 0, 1.0, scale_X1)
    return cast(input_XI / scale_X1) * scale_X1


def compress(model: Any, tokens_NT: torch.Tensor, *, skip: Sequence[str] = ()) -> None:
    """Quantize in place; layers quantize their inputs from then on."""
    for layer in each_layer(model, skip):
        weight_OI = layer.weight.data
        scale_O1 = (weight_OI.abs().amax(1, keepdim=True) / LARGEST).to(model.stored_dtype).to(model.dtype)
        scale_O1[scale_O1 == 0] = 1
        layer.weight.data = cast(weight_OI / scale_O1) * scale_O1
        quantize_inputs(layer, by_token)
