"""Depth pruning by ShortGPT's block influence or SLEB's greedy choice.

Block influence (Men et al. 2024, arXiv:2403.03853, eq. 1): BI_l = 1 - E_t[cos(h_l, h_{l+1})]; the lowest go at once.
SLEB (Song et al. 2024, arXiv:2402.09025, algorithm 1): the layer goes without which the loss is lowest, then again.
Losses are those of next tokens in the calibration windows, each token with equal weight.

Shape legend: N = sequences, T = tokens, D = width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy


@torch.no_grad()
def influences(model: Any, tokens_NT: torch.Tensor) -> list[float]:
    """Return BI of each layer. The last one's output is taken before the final norm."""
    layers = model.model.layers
    cosines: list[list[torch.Tensor]] = [[] for _ in layers]

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            after_1TD = output[0] if isinstance(output, tuple) else output
            cosines[index].append(cosine_similarity(args[0], after_1TD, dim=-1).flatten())

        return layers[index].register_forward_hook(hook)

    handles = [watch(index) for index in range(len(layers))]
    for tokens_T in tokens_NT:
        model(tokens_T[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [1 - float(torch.cat(of_layer).mean()) for of_layer in cosines]


@torch.no_grad()
def loss(model: Any, tokens_NT: torch.Tensor) -> float:
    """Return the mean next-token loss."""
    total = 0.0
    for tokens_T in tokens_NT:
        logits_TV = model(tokens_T[None], use_cache=False).logits[0, :-1]
        total += float(cross_entropy(logits_TV, tokens_T[1:], reduction="sum"))
    return total / tokens_NT[:, 1:].numel()


def keep(model: Any, layers: list[Any]) -> None:
    """Leave these layers only."""
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


def compress(model: Any, tokens_NT: torch.Tensor, *, layers: int, greedy: bool) -> None:
    """Remove that many layers in place."""
    left = list(model.model.layers)
    if greedy:
        for _ in range(layers):
            losses = []
            for index in range(len(left)):
                keep(model, left[:index] + left[index + 1 :])
                losses.append(loss(model, tokens_NT))
            del left[losses.index(min(losses))]
    else:
        influence = influences(model, tokens_NT)
        gone = sorted(range(len(left)), key=lambda index: influence[index])[:layers]
        left = [layer for index, layer in enumerate(left) if index not in gone]
    keep(model, left)
