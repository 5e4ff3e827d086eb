"""Magnitude pruning and Wanda (Sun et al. 2023, arXiv:2306.11695, eq. 1): S_ij = |W_ij| ||X_j||_2.

The half of each row with the lowest score becomes 0, or 2 of every 4 neighbours; no weight is updated. Magnitude is the
same with S_ij = |W_ij|; by rows, which the paper (table 7) finds better than by layers.

Shape legend: T = tokens, O = out features, I = in features, M = weights that compete.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.reference.model import compress_in_turn, each_layer, store


def prune(weight_OI: torch.Tensor, score_OI: torch.Tensor, pattern: str | None) -> torch.Tensor:
    """Return the weight without the half with the lowest scores."""
    score_XM = score_OI.reshape(-1, 4 if pattern else score_OI.shape[1])
    lowest_XM = score_XM.argsort(dim=1, stable=True)[:, : score_XM.shape[1] // 2]
    return weight_OI.reshape(score_XM.shape).scatter(1, lowest_XM, 0.0).view_as(weight_OI)


def by_wanda(weight_OI: torch.Tensor, input_TI: torch.Tensor, *, pattern: str | None) -> torch.Tensor:
    """Prune one layer."""
    return prune(weight_OI, weight_OI.abs() * input_TI.norm(dim=0), pattern)


def compress(model: Any, tokens_NT: torch.Tensor, *, pattern: str | None = None, skip: Sequence[str] = ()) -> None:
    """Prune by Wanda in place."""
    compress_in_turn(model, tokens_NT, partial(by_wanda, pattern=pattern), skip)


def compress_by_magnitude(
    model: Any, tokens_NT: torch.Tensor, *, pattern: str | None = None, skip: Sequence[str] = ()
) -> None:
    """Prune by magnitude in place."""
    for layer in each_layer(model, skip):
        store(model, layer, prune(layer.weight.data, layer.weight.data.abs(), pattern))
