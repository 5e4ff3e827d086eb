"""In which order a block's linear layers read their inputs, and where a forward pass can be cut and taken up again.

A block's layers are compressed in the order in which they are called, each on inputs that the compressed ones before
it produce ("true sequential" in the GPTQ authors' code). Run naively, that repeats the block once for each layer. But
a child of the block (attention, MLP) that returns the very tensor that its last linear layer put out need not be run
again once it is finished: its output follows from the kept input of that layer. So the stages of a block cost about
one forward pass together, less than measuring all layers at once and then running the compressed block.

What is shared and what can be cut is found by running one sequence and comparing tensors by identity.

Shape legend: B = sequences of a batch, T = tokens, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StepError

if TYPE_CHECKING:
    import torch

    from orchestrator.skeleton import Block


@dataclass(frozen=True)
class Cut:
    """A child module whose output is that of its last linear layer; `rest`: how many Nones follow it in a tuple."""

    child: str
    layer: str
    rest: int | None  # None: the child returns the tensor itself


@dataclass(frozen=True)
class Layout:
    """What one sequence showed of a block.

    leader_of: for each linear layer the first one that reads the very same tensor.
    stages: leaders, in the order of their calls; those of one stage are measured in one pass.
    cuts: by the leader of the child's last layer.
    """

    leader_of: dict[str, str]
    stages: tuple[tuple[str, ...], ...]
    cuts: dict[str, Cut]


def layout_of(block: Block, run: Callable[[], object]) -> Layout:
    """Return the layout of a block. run: sends one sequence through it.

    Raises `StepError` for a linear layer that takes no part.
    """
    seen: list[tuple[torch.Tensor, str]] = []  # holds the tensors, so that none's identity is used twice
    # Of experts it is known from the start: whether they see any of one sequence's tokens is chance.
    leader_of = {name: group[0] for group in block.same_input for name in group}
    outputs: dict[str, torch.Tensor] = {}
    returned: dict[str, list[Any]] = {}
    flat: set[str] = set()  # layers whose input is no [B, T, I]

    def note_input(name: str, tensor: torch.Tensor) -> None:
        if tensor.ndim != 3:
            flat.add(name)
        for other, leader in seen:
            if other is tensor:
                leader_of[name] = leader
                return
        seen.append((tensor, name))
        leader_of[name] = name

    with ExitStack() as stack:
        for name, layer in block.linears.items():
            if name not in block.experts:
                before = layer.register_forward_pre_hook(lambda m, inputs, n=name: note_input(n, inputs[0]))
                after = layer.register_forward_hook(lambda m, inputs, output, n=name: outputs.update({n: output}))
                stack.callback(before.remove)
                stack.callback(after.remove)
        for name, child in block.module.named_children():
            returned[name] = []
            handle = child.register_forward_hook(lambda m, inputs, output, n=name: returned[n].append(output))
            stack.callback(handle.remove)
        run()
    idle = sorted(block.linears.keys() - leader_of.keys())
    if idle:
        raise StepError(f"{idle[0]} takes no part in the forward pass of {block.name}")
    cuts = {
        leader_of[cut.layer]: cut for cut in _cuts(block, list(outputs), outputs, returned) if cut.layer not in flat
    }
    return Layout(leader_of, _stages(block, [name for _, name in seen], cuts), cuts)


def _cuts(
    block: Block, called: list[str], outputs: dict[str, torch.Tensor], returned: dict[str, list[Any]]
) -> Iterator[Cut]:
    for child, results in returned.items():
        inside = [name for name in called if name.startswith(f"{block.name}.{child}.")]
        has_experts = any(name.startswith(f"{block.name}.{child}.") for name in block.experts)
        if not inside or has_experts or len(results) != 1:
            continue
        (result,) = results
        first, *others = result if isinstance(result, tuple) and result else (result,)
        if first is outputs[inside[-1]] and all(other is None for other in others):
            yield Cut(child, inside[-1], len(others) if isinstance(result, tuple) else None)


def _stages(block: Block, called: list[str], cuts: dict[str, Cut]) -> tuple[tuple[str, ...], ...]:
    """One leader a stage, as long as what was finished before need not be run again; else all in one."""
    children = {name.removeprefix(f"{block.name}.").partition(".")[0] for name in block.experts}
    experts = [group[0] for group in block.same_input]
    late = [name for name in called if name.removeprefix(f"{block.name}.").partition(".")[0] in children]
    early = [name for name in called if name not in late]
    holders = {name.removeprefix(f"{block.name}.").partition(".")[0] for name in early}
    nested = {child for child in holders if f"{block.name}.{child}" not in block.linears}
    can_cut = {cut.child for cut in cuts.values()}
    last = early[-1].removeprefix(f"{block.name}.").partition(".")[0] if early and not late and not experts else None
    if not nested - {last} <= can_cut:
        return ((*called, *experts),)
    stages = [(name,) for name in early]
    return (*stages, (*late, *experts)) if late or experts else tuple(stages)
