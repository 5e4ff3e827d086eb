"""Gradients of the next-token loss by the weights of decoder blocks, one block after the other, last to first.

Whole-model gradients are as large as the model. Here the model runs forward without any, and only what passes between
blocks is kept, in mapped files that the page cache may drop. The gradient by the last hidden states comes from the norm
and the head alone, some positions at a time. Then each block is run again with gradients on, takes the gradient by what
it puts out and gives those by its weights and by what entered it, which takes the place of the hidden states. It is the
chain rule in the order of autograd itself, so the numbers are those of a backward pass through the whole model.

Shape legend: N = windows, T = tokens of a window, D = model width, V = vocabulary, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator_pruning.dependency_groups import Call, watched

if TYPE_CHECKING:
    import torch
    from torch import nn

CHUNK_ELEMENTS = 1 << 24  # logits that exist at a time: 64 MiB in float32


@dataclass(frozen=True)
class Gradient:
    """The mean over windows of a weight's gradient, and of its square where that was asked for."""

    mean_OI: torch.Tensor
    square_OI: torch.Tensor | None


def block_gradients(
    model: Any,
    blocks: Mapping[str, nn.Module],
    layers: Sequence[str],
    tokens_NT: torch.Tensor,
    scratch: Path,
    *,
    squares: bool,
) -> Iterator[tuple[str, dict[str, Gradient]]]:
    """Yield (block name, {layer: gradient}) from the last block to the first; nothing of a block is kept.

    layers: by their names within a block; their weights must require gradients. The loss of a window is the mean over
    its predicted tokens; windows pass one by one, as the squares of their gradients are asked for one by one.
    """
    import torch

    modules = list(blocks.values())
    hidden, calls, in_tuple = _forward(model, modules, tokens_NT, scratch)
    for window, tokens_T in enumerate(tokens_NT):
        last_1TD = hidden[-1][window : window + 1]
        last_1TD.copy_(_gradient_behind_blocks(model, modules, tokens_T[None], last_1TD.clone(), in_tuple=in_tuple))
    for index in reversed(range(len(modules))):
        name, block = list(blocks.items())[index]
        weights: list[torch.Tensor] = [block.get_submodule(layer).weight for layer in layers]  # type: ignore[misc]
        means = [torch.zeros_like(weight_OI) for weight_OI in weights]
        mean_squares = [torch.zeros_like(weight_OI) for weight_OI in weights] if squares else [None] * len(weights)
        for window in range(len(tokens_NT)):
            entering_1TD = hidden[index][window : window + 1].to(model.device).clone().requires_grad_()
            with torch.enable_grad():
                leaving_1TD = calls[window][index](block, entering_1TD)
            gradient_1TD = hidden[index + 1][window : window + 1].to(leaving_1TD.device)
            by_entering_1TD, *gradients = torch.autograd.grad(leaving_1TD, [entering_1TD, *weights], gradient_1TD)
            hidden[index][window] = by_entering_1TD[0]
            for mean_OI, square_OI, gradient_OI in zip(means, mean_squares, gradients, strict=True):
                mean_OI += gradient_OI / len(tokens_NT)
                if square_OI is not None:
                    square_OI += gradient_OI.square() / len(tokens_NT)
        found = (Gradient(mean_OI, square_OI) for mean_OI, square_OI in zip(means, mean_squares, strict=True))
        yield name, dict(zip(layers, found, strict=True))


def _forward(
    model: Any, modules: Sequence[nn.Module], tokens_NT: torch.Tensor, scratch: Path
) -> tuple[list[torch.Tensor], list[list[Call]], bool]:
    """Return what enters each block and what leaves the last [N, T, D] each, how each window's blocks were called, and
    whether blocks put their hidden states out in a tuple.
    """
    import torch

    hidden: list[torch.Tensor] = []
    calls: list[list[Call]] = []
    in_tuple = False

    def keep(index: int, hidden_1TD: torch.Tensor) -> None:
        if index == len(hidden):
            hidden.append(_mapped((*tokens_NT.shape, hidden_1TD.shape[-1]), hidden_1TD.dtype, scratch / f"{index}.gradients"))
        hidden[index][len(calls) - 1] = hidden_1TD[0]

    def enters(index: int, hidden_1TD: torch.Tensor, call: Call) -> None:
        keep(index, hidden_1TD)
        calls[-1].append(call)

    def leaves(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal in_tuple
        in_tuple = isinstance(output, tuple)
        keep(len(modules), output[0] if in_tuple else output)

    with torch.no_grad(), watched(modules, enters):
        handle = modules[-1].register_forward_hook(leaves)
        try:
            for tokens_T in tokens_NT:
                calls.append([])
                model(input_ids=tokens_T[None].to(model.device), use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
    return hidden, calls, in_tuple


def _gradient_behind_blocks(
    model: Any, modules: Sequence[nn.Module], tokens_1T: torch.Tensor, last_1TD: torch.Tensor, *, in_tuple: bool
) -> torch.Tensor:
    """Return the gradient [1, T, D] of a window's loss by what the last block puts out."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens_1T = tokens_1T.to(model.device)
    last_1TD = last_1TD.to(model.device).requires_grad_()
    gradient_1TD = torch.zeros_like(last_1TD)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    num_predicted = tokens_1T.shape[1] - 1
    with torch.enable_grad(), _standing_in(modules, last_1TD, in_tuple=in_tuple):
        for positions in torch.arange(num_predicted, device=model.device).split(max(1, CHUNK_ELEMENTS // vocabulary)):
            logits_TV = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=positions).logits[0]
            loss = cross_entropy(logits_TV, tokens_1T[0, positions + 1], reduction="sum") / num_predicted
            gradient_1TD += torch.autograd.grad(loss, last_1TD)[0]
    return gradient_1TD


@contextmanager
def _standing_in(modules: Sequence[nn.Module], last_1TD: torch.Tensor, *, in_tuple: bool) -> Iterator[None]:
    """Let the blocks pass on what they get and the last put out `last_1TD`: of the model, the norm and the head stay."""

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if in_tuple else hidden

    def put_out(*args: Any, **kwargs: Any) -> Any:
        return (last_1TD,) if in_tuple else last_1TD

    try:
        for module in modules:
            module.forward = put_out if module is modules[-1] else pass_on
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> torch.Tensor:
    """Return a tensor whose memory is a new file's; the file has no name any more, and goes with the tensor."""
    import math

    import torch

    tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
    path.unlink()
    return tensor
