"""Gradients of the next-token loss by the weights of decoder blocks, one block after the other, last to first.

Whole-model gradients are as large as the model. Here the model runs forward without any, and only what passes between
blocks is kept, in files. The gradient by the last hidden states comes from the norm and the head alone, some positions
at a time. Then each block is run again with gradients on, takes the gradient by what it puts out and gives those by its
weights and by what entered it, which takes the place of the hidden states. It is the chain rule in the order of
autograd itself, so the numbers are those of a backward pass through the whole model.

Shape legend: N = windows, T = tokens of a window, D = model width, V = vocabulary, O = out features, I = in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestrator_pruning.dependency_groups import Call, watched
from orchestrator_pruning.precision import widened

if TYPE_CHECKING:
    import torch
    from torch import nn

CHUNK_ELEMENTS = 1 << 24  # logits that exist at a time: 64 MiB in float32


@dataclass(frozen=True)
class Gradient:
    """The mean over windows of a weight's gradient, and of its square where that was asked for."""

    mean_OI: torch.Tensor
    square_OI: torch.Tensor | None


@dataclass(frozen=True)
class _Between:
    """What passes between blocks, [N, T, D] for each place: 0 before the first block, L behind the last of L.

    Each place is a file that is mapped only while it is in use, so that its pages do not stay with the process.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, place: int) -> torch.Tensor:
        import torch

        size = math.prod(self.shape)
        return torch.from_file(str(self._path(place)), shared=True, size=size, dtype=self.dtype).view(self.shape)

    def remove(self, place: int) -> None:
        """Delete the file, if there is one."""
        self._path(place).unlink(missing_ok=True)

    def _path(self, place: int) -> Path:
        return self.folder / f"between-blocks-{place}"


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

    layers: by their names within a block. model: computing in float32 or wider (`precision.in_float32`). The loss of a
    window is the mean over its predicted tokens; windows pass one by one, as the squares of their gradients are asked
    for one by one.
    """
    import torch

    modules, last = list(blocks.values()), len(blocks)
    dtype = torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)
    between = _Between(scratch, (*tokens_NT.shape, model.config.hidden_size), dtype)
    try:
        calls, in_tuple = _forward(model, modules, tokens_NT, between)
        behind_NTD = between[last]
        for window, tokens_T in enumerate(tokens_NT):
            hidden_1TD = behind_NTD[window, None].clone()
            gradient_1TD = _gradient_behind_blocks(model, modules, tokens_T[None], hidden_1TD, in_tuple=in_tuple)
            behind_NTD[window] = gradient_1TD[0]
        del behind_NTD
        for index, name in reversed(list(enumerate(blocks))):
            of_block = [by_window[index] for by_window in calls]
            with widened(blocks[name]):
                found = _of_block(blocks[name], layers, of_block, between[index], between[index + 1], squares=squares)
            yield name, found
            del found
            between.remove(index + 1)
    finally:
        for place in range(last + 1):
            between.remove(place)


def _of_block(
    block: nn.Module,
    layers: Sequence[str],
    calls: Sequence[Call],
    before_NTD: torch.Tensor,
    behind_NTD: torch.Tensor,
    *,
    squares: bool,
) -> dict[str, Gradient]:
    """Return the gradients of one block, and put those by what enters it in the place of what enters it.

    before_NTD: what enters the block. behind_NTD: the gradients by what it puts out.
    """
    import torch

    weights: list[torch.Tensor] = [cast("torch.Tensor", block.get_submodule(layer).weight) for layer in layers]
    required = [weight_OI.requires_grad for weight_OI in weights]
    for weight_OI in weights:
        weight_OI.requires_grad_(True)
    means = [torch.zeros_like(weight_OI) for weight_OI in weights]
    mean_squares = [torch.zeros_like(weight_OI) if squares else None for weight_OI in weights]
    for window, call in enumerate(calls):
        entering_1TD = before_NTD[window, None].to(weights[0].device, copy=True).requires_grad_()
        with torch.enable_grad():
            leaving_1TD = call(block, entering_1TD)
        gradient_1TD = behind_NTD[window, None].to(leaving_1TD.device)
        by_entering_1TD, *gradients = torch.autograd.grad(leaving_1TD, [entering_1TD, *weights], gradient_1TD)
        before_NTD[window] = by_entering_1TD[0]
        for mean_OI, square_OI, gradient_OI in zip(means, mean_squares, gradients, strict=True):
            mean_OI.add_(gradient_OI, alpha=1 / len(calls))
            if square_OI is not None:
                square_OI.addcmul_(gradient_OI, gradient_OI, value=1 / len(calls))
        del gradients, gradient_OI  # before those of the next window come
    for weight_OI, before in zip(weights, required, strict=True):
        weight_OI.requires_grad_(before)
    found = (Gradient(mean_OI, square_OI) for mean_OI, square_OI in zip(means, mean_squares, strict=True))
    return dict(zip(layers, found, strict=True))


def _forward(
    model: Any, modules: Sequence[nn.Module], tokens_NT: torch.Tensor, between: _Between
) -> tuple[list[list[Call]], bool]:
    """Fill `between`; return how each window's blocks were called, and whether they put out a tuple."""
    import torch

    calls: list[list[Call]] = []
    in_tuple = False

    def enters(index: int, hidden_1TD: torch.Tensor, call: Call) -> None:
        between[index][len(calls) - 1] = hidden_1TD[0]
        calls[-1].append(call)

    def leaves(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal in_tuple
        in_tuple = isinstance(output, tuple)
        between[len(modules)][len(calls) - 1] = (output[0] if in_tuple else output)[0]

    with torch.no_grad(), watched(modules, enters):
        handle = modules[-1].register_forward_hook(leaves)
        try:
            for tokens_T in tokens_NT:
                calls.append([])
                model(input_ids=tokens_T[None].to(model.device), use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
    return calls, in_tuple


def _gradient_behind_blocks(
    model: Any, modules: Sequence[nn.Module], tokens_1T: torch.Tensor, last_1TD: torch.Tensor, *, in_tuple: bool
) -> torch.Tensor:
    """Return the gradient [1, T, D] of a window's loss by what the last block puts out."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens_1T = tokens_1T.to(model.device)
    last_1TD = last_1TD.to(model.device).requires_grad_()
    gradient_1TD = torch.zeros_like(last_1TD)
    chunk = max(1, CHUNK_ELEMENTS // model.get_output_embeddings().weight.shape[0])
    num_predicted = tokens_1T.shape[1] - 1
    with torch.enable_grad(), _standing_in(modules, last_1TD, in_tuple=in_tuple):
        for positions in torch.split(torch.arange(num_predicted, device=model.device), chunk):
            logits_TV = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=positions).logits[0]
            loss = cross_entropy(logits_TV, tokens_1T[0, positions + 1], reduction="sum") / num_predicted
            gradient_1TD += torch.autograd.grad(loss, last_1TD)[0]
    return gradient_1TD


@contextmanager
def _standing_in(modules: Sequence[nn.Module], last_1TD: torch.Tensor, *, in_tuple: bool) -> Iterator[None]:
    """Let blocks pass on what they get and the last put out `last_1TD`: of the model, norm and head stay."""

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
