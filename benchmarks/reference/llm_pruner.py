"""LLM-Pruner's choice of MLP channels (Ma et al. 2023, arXiv:2305.11627, eq. 3-5), by masking; no recovery.

A group is row i of gate and of up, and column i of down. With g the mean over windows of the gradient of a window's
mean loss, and F the mean of its squares, s = w g (first), w^2 F (second) or w g - w^2 F / 2 (mixed). A group's
importance is the sum over its rows and columns of |sum s| (vector) or of sum |s| (element), or the squared norm (l2).
The least important fifth of each block goes: here it is set to zero, which computes the same.

Choices, this project's: windows are cut to 256 tokens; the first eighth of them (at most 16) is not looked at, and of
the others 32 at most; what stays is the nearest multiple of 8 to four fifths; all blocks lose the same number.

Shape legend: N = windows, T = tokens, O = out features, I = in features, C = MLP channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

RATIO, MULTIPLE = 0.2, 8
LENGTH, WINDOWS = 256, 32


def windows(tokens_NT: torch.Tensor) -> torch.Tensor:
    """Return the windows that gradients are taken on."""
    length = min(LENGTH, tokens_NT.shape[1])
    cut_NT = tokens_NT[:, : tokens_NT.shape[1] // length * length].reshape(-1, length)
    unseen = min(16, max(1, len(cut_NT) // 8))
    return cut_NT[unseen:][:WINDOWS]


def gradients(model: Any, tokens_NT: torch.Tensor) -> tuple[dict[Any, torch.Tensor], dict[Any, torch.Tensor]]:
    """Return mean and mean square of the gradients by each MLP layer's weight, from whole backward passes."""
    layers = [layer for block in model.model.layers for layer in (block.mlp.gate_proj, block.mlp.up_proj)]
    layers += [block.mlp.down_proj for block in model.model.layers]
    mean = {layer: torch.zeros_like(layer.weight) for layer in layers}
    square = {layer: torch.zeros_like(layer.weight) for layer in layers}
    for layer in layers:
        layer.weight.requires_grad_(True)
    for tokens_T in tokens_NT:
        logits_TV = model(tokens_T[None], use_cache=False).logits[0, :-1]
        found = torch.autograd.grad(cross_entropy(logits_TV, tokens_T[1:]), [layer.weight for layer in layers])
        for layer, gradient_OI in zip(layers, found, strict=True):
            mean[layer] += gradient_OI / len(tokens_NT)
            square[layer] += gradient_OI**2 / len(tokens_NT)
    for layer in layers:
        layer.weight.requires_grad_(False)
    return mean, square


def importance(
    block: Any, mean: dict[Any, torch.Tensor], square: dict[Any, torch.Tensor], order: str, granularity: str
) -> torch.Tensor:
    """Return the importance of each channel [C]."""
    total_C = torch.zeros(block.mlp.down_proj.in_features, dtype=block.mlp.down_proj.weight.dtype)
    for layer, inside in ((block.mlp.gate_proj, 1), (block.mlp.up_proj, 1), (block.mlp.down_proj, 0)):
        weight_OI = layer.weight.data
        if order == "l2":
            total_C += (weight_OI**2).sum(inside)
            continue
        first_OI, second_OI = weight_OI * mean[layer], weight_OI**2 * square[layer]
        s_OI = {"first": first_OI, "second": second_OI, "mixed": first_OI - second_OI / 2}[order]
        total_C += s_OI.sum(inside).abs() if granularity == "vector" else s_OI.abs().sum(inside)
    return total_C


def compress(model: Any, tokens_NT: torch.Tensor, *, order: str, granularity: str = "element") -> None:
    """Mask in place. order: "first", "second", "mixed" or "l2"."""
    mean, square = ({}, {}) if order == "l2" else gradients(model, windows(tokens_NT))
    for block in model.model.layers:
        importance_C = importance(block, mean, square, order, granularity)
        channels = len(importance_C)
        kept = math.floor((1 - RATIO) * channels / MULTIPLE + 0.5) * MULTIPLE
        gone_C = importance_C.argsort(stable=True)[: channels - kept]
        block.mlp.gate_proj.weight.data[gone_C] = 0
        block.mlp.up_proj.weight.data[gone_C] = 0
        block.mlp.down_proj.weight.data[:, gone_C] = 0
