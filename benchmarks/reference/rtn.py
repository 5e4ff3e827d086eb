"""Round to nearest: the baseline of GPTQ's paper (arXiv:2210.17323, section 4). Needs no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.reference import grids
from benchmarks.reference.model import each_layer, store


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
    for layer in each_layer(model, skip):
        store(model, layer, grids.round_to_nearest(layer.weight.data, setting))
