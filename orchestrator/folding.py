"""Moving scale from the input of some layers into their weights, without changing what the block computes.

For any s > 0, (x / s) (W s)^T = x W^T. So a `ScalingMethod` may choose s to make W easier to quantize, if whatever
produces x can be divided by s for good: the weight of a norm, or the rows of a linear layer. Which module that is, is
found by trying: a candidate is multiplied by powers of two, the layers are divided by them, and the block must put out
what it did before. That settles at once who else reads the same tensor (a residual, a router), whether a nonlinear
function lies between, and whether heads are shared between queries: no architecture is known by name.

Shape legend: B = sequences, T = tokens, D = model width, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orchestrator.skeleton import Block

PROBE_TOKENS = 16  # at most
# Of the largest output. Powers of two scale exactly; what remains is Gemma's 1 + weight, rounded in float32.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fold:
    """Where a scale of a group's input can go.

    members: the layers that read the input. owner: full name of the module that can be divided. offset: what is added
    to its weight before it multiplies (1 for Gemma's norms).
    """

    members: tuple[str, ...]
    owner: str
    offset: float


def folds_of(
    block: Block, leader_of: Mapping[str, str], run: Callable[[torch.Tensor], torch.Tensor], shape_TD: tuple[int, int]
) -> dict[str, Fold]:
    """Return for each leader of a group where its scale can go; groups without such a place, and experts, are left out.

    run: sends hidden states [1, T, D] through the loaded block.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    device = next(iter(block.linears.values())).weight.device
    hidden_BTD = torch.randn(1, *shape_TD, generator=generator).to(device)
    expected_BTD = run(hidden_BTD)
    limit = _TOLERANCE * float(expected_BTD.abs().max())
    groups: dict[str, list[str]] = {}
    for name, leader in leader_of.items():
        if name not in block.experts:
            groups.setdefault(leader, []).append(name)
    found = {}
    for leader, members in groups.items():
        num_in = block.linears[leader].in_features
        factor_I = torch.exp2(torch.randint(-2, 3, (num_in,), generator=generator).float()).to(device)
        for owner, module, offset in _candidates(block, members, num_in):
            with _scaled([block.linears[name] for name in members], module, offset, factor_I):
                difference = float((run(hidden_BTD) - expected_BTD).abs().max())
            if difference <= limit:
                found[leader] = Fold(tuple(members), owner, offset)
                break
    return found


def fold(
    block: Block, place: Fold, scale_I: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Divide the owner by `scale_I` and multiply the members' columns by it, in place.

    The owner's numbers are rounded to `dtype`, in which they are stored; the members are multiplied by what that
    comes to. Returns that scale [I], and the tensors of a norm, or the bias of a layer, by their full names.
    """
    import torch

    owner: Any = block.module.get_submodule(place.owner.removeprefix(f"{block.name}."))
    changed = {}
    if isinstance(owner, torch.nn.Linear):
        owner.weight.data /= scale_I[:, None]
    else:
        before_I = owner.weight.data + place.offset
        owner.weight.data = (before_I / scale_I - place.offset).to(dtype).float()
        after_I = owner.weight.data + place.offset
        # Features that the norm multiplies by zero, or by a number that is lost in rounding, are left to the bias.
        scale_I = torch.where((before_I == 0) | (after_I == 0), scale_I, before_I / after_I)
        changed[f"{place.owner}.weight"] = owner.weight.data
    if getattr(owner, "bias", None) is not None:
        owner.bias.data = (owner.bias.data / scale_I).to(dtype).float()
        changed[f"{place.owner}.bias"] = owner.bias.data
    for name in place.members:
        block.linears[name].weight.data *= scale_I
    return scale_I, changed


def _candidates(block: Block, members: Sequence[str], num_in: int) -> Iterator[tuple[str, nn.Module, float]]:
    """Modules of a block that may produce a tensor of this width: norms, then linear layers."""
    from torch import nn

    modules = [(f"{block.name}.{name}", module) for name, module in block.module.named_modules() if name]
    for name, module in modules:
        weight = module._parameters.get("weight")
        if weight is not None and tuple(weight.shape) == (num_in,):
            yield name, module, 0.0
            yield name, module, 1.0
    for name, module in modules:
        produces = isinstance(module, nn.Linear) and module.out_features == num_in
        if produces and name not in members and name not in block.experts:
            yield name, module, 0.0


@contextmanager
def _scaled(members: Sequence[nn.Linear], owner: Any, offset: float, factor_I: torch.Tensor) -> Iterator[None]:
    """Multiply what a module puts out, and divide the layers that read it, for the time of the block."""
    kept = [(module, module.weight.data) for module in members]
    weight: torch.Tensor = owner.weight.data
    bias: Any = getattr(owner, "bias", None)
    bias_data: Any = None if bias is None else bias.data
    try:
        owner.weight.data = (weight + offset) * _rows(factor_I, weight) - offset
        if bias is not None:
            bias.data = bias_data * factor_I
        for module in members:
            module.weight.data = module.weight.data / factor_I
        yield
    finally:
        owner.weight.data = weight
        if bias is not None:
            bias.data = bias_data
        for module, data in kept:
            module.weight.data = data


def _rows(factor_I: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return factor_I[:, None] if weight.ndim == 2 else factor_I
