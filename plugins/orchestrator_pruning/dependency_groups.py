"""Which rows and columns of a decoder block's linear layers go together, found by experiment.

Ma et al. 2023, arXiv:2305.11627, section 3.1: a structure can be removed only with all that depends on it (eq. 1, 2).
No architecture is listed here. A block is run with the output of every linear layer replaced by numbers that depend on
nothing. What a layer then reads depends on what enters the block, or on the outputs of the layers just before it alone:

- a layer that reads nothing of what enters the block is a *reader* (`o_proj`, `down_proj`); the layers whose outputs it
  reads are its *sources* (q, k and v; gate and up);
- column i of the reader and row j of a source are tied if the gradient of the reader's input i by the source's output j
  is not zero. The connected parts of this relation are the groups: {gate_i, up_i, column i of down}, and of attention
  all that hangs on one KV head: its rows of k and v, the query heads that share it, and their columns of o.

Fused layers (gate and up in one matrix; q, k and v) need nothing of their own: two rows of one source are then in one
group.

Shape legend: B = copies of the input, T = tokens, D = model width, O = out features, I = in features, C = columns
probed at once, G = groups, K = rows or columns of one layer in one group, E = ties, X = nodes (columns and rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from orchestrator.api import StepError, decoder_blocks

if TYPE_CHECKING:
    import torch
    from torch import nn

PROBES = 32  # columns probed in one backward pass, each in a copy of the input of its own
_TOKENS = 8  # of a copy: two or more, or a softmax over one key would hide what queries and keys do
_SEED = 0  # of the numbers that a block is tried with
REMEDY = "use a dense model like Llama, Mistral, Qwen, Gemma or Phi-3, or a method that prunes single weights"


@dataclass(frozen=True)
class Call:
    """How a model calls a block: all arguments but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that the block puts out."""
        output = block(hidden_BTD, *self.args, **self.kwargs)
        return cast("torch.Tensor", output[0] if isinstance(output, tuple | list) else output)


@dataclass(frozen=True)
class Member:
    """A layer's part in the groups of a set: group g has its rows (axis 0) or columns (axis 1) `index_GK[g]`."""

    layer: str  # within the block, e.g. mlp.up_proj
    axis: int
    index_GK: torch.Tensor


@dataclass(frozen=True)
class GroupSet:
    """Groups of a block that are alike, such as its KV groups or its MLP channels; the last member is the reader."""

    members: tuple[Member, ...]

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.members[-1].index_GK)

    @property
    def width(self) -> int:
        """Columns of the reader in each group."""
        return self.members[-1].index_GK.shape[1]

    @property
    def reader(self) -> str:
        """The layer whose columns belong to the groups."""
        return self.members[-1].layer


def blocks_of(model: Any) -> dict[str, nn.Module]:
    """Return the decoder blocks by name. Raises `PreflightError` if they cannot be found."""
    return {name: model.get_submodule(name) for name in decoder_blocks(model, model.config.num_hidden_layers)}


@contextmanager
def watched(blocks: Sequence[nn.Module], seen: Callable[[int, torch.Tensor, Call], None]) -> Iterator[None]:
    """Call ``seen(index, hidden states, call)`` whenever a block is about to run."""

    def watcher(index: int) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
            seen(index, args[0] if args else kwargs["hidden_states"], Call(args[1:], rest))

        return before

    handles = [block.register_forward_pre_hook(watcher(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Probe:
    """What blocks are tried with: hidden states [B, T, D] of random numbers, and how the model calls each block."""

    hidden_BTD: torch.Tensor
    calls: tuple[Call, ...]


def make_probe(model: Any, blocks: Sequence[nn.Module]) -> Probe:
    """Run some tokens through the model to see how it calls its blocks."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens_BT = torch.randint(vocabulary, (PROBES, _TOKENS), generator=generator).to(model.device)
    calls: list[Call] = []
    entering: list[torch.Tensor] = []

    def seen(index: int, hidden_BTD: torch.Tensor, call: Call) -> None:
        calls.append(call)
        entering.append(hidden_BTD)

    with torch.no_grad(), watched(blocks, seen):
        model(input_ids=tokens_BT, use_cache=False)
    if len(calls) != len(blocks):
        raise StepError(f"the model ran {len(calls)} blocks where it has {len(blocks)}", remedy=REMEDY)
    return Probe(torch.randn(entering[0].shape, generator=generator).to(entering[0]), tuple(calls))


def trace_all(blocks: Mapping[str, nn.Module], probe: Probe) -> dict[str, tuple[GroupSet, ...]]:
    """Trace every block. Raises `StepError` if they are not alike: one number in config.json is for all of them."""
    traced = {
        name: trace(block, name, call, probe.hidden_BTD)
        for (name, block), call in zip(blocks.items(), probe.calls, strict=True)
    }
    forms = {
        name: [(member.layer, member.axis, member.index_GK.shape) for groups in sets for member in groups.members]
        for name, sets in traced.items()
    }
    first = next(iter(forms))
    for name, form in forms.items():
        if form != forms[first]:
            raise StepError(
                f"the layers of {name} go together in another way than those of {first}, but config.json has one number"
                " for both",
                remedy="use a method that prunes single weights",
            )
    return traced


def trace(block: nn.Module, name: str, call: Call, hidden_BTD: torch.Tensor) -> tuple[GroupSet, ...]:
    """Return the sets of groups of a block called `name`, in the order of their readers in the block.

    Raises `StepError` for a layer that is in no set, or in two.
    """
    import torch

    entering_BTD = hidden_BTD.detach().clone().requires_grad_()
    with torch.enable_grad():
        read, made, leaving_BTD = _run_cut(block, name, call, entering_BTD)
    entrance = "what enters the block"
    reads = {layer: _dependencies(tensor, {entrance: entering_BTD, **made}) for layer, tensor in read.items()}
    readers = [layer for layer in reads if entrance not in reads[layer]]
    goes_out = _dependencies(leaving_BTD, made)
    reader_of: dict[str, str] = {}
    sets = []
    for reader in readers:
        for source in reads[reader]:
            if source in readers:
                raise _unplaced(name, source, f"it reads what other layers of the block put out, and {reader} reads it")
            if source in reader_of:
                raise _unplaced(name, source, f"both {reader_of[source]} and {reader} read it")
            if source in goes_out:
                raise _unplaced(name, source, f"{reader} reads it, and it goes into the block's output as well")
            reader_of[source] = reader
        if not reads[reader]:
            raise _unplaced(name, reader, "it reads neither what enters the block nor another linear layer")
        sets.append(_components(name, reader, read[reader], {source: made[source] for source in reads[reader]}))
    for layer in reads:
        if layer not in readers and layer not in reader_of:
            raise _unplaced(name, layer, "it reads what enters the block, and no linear layer reads it")
    return tuple(sets)


def require_linear(block: nn.Module, name: str) -> None:
    """Raise `StepError` for a matrix in a block called `name` that belongs to no linear layer."""
    from torch import nn

    for inner, parameter in block.named_parameters():
        owner = block.get_submodule(inner.rpartition(".")[0])
        if parameter.ndim > 1 and not isinstance(owner, nn.Linear):
            raise _unplaced(name, inner, f"it belongs to a {type(owner).__name__}, not to a linear layer")


def _run_cut(
    block: nn.Module, name: str, call: Call, entering_BTD: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Run a block with cuts behind its linear layers; return what each read, what stood in for its output, the output.

    Every number has both signs over the tokens, so that no activation function is flat at all of them.
    """
    import torch
    from torch import nn

    require_linear(block, name)
    linears = {inner: module for inner, module in block.named_modules() if isinstance(module, nn.Linear)}
    generator = torch.Generator().manual_seed(_SEED)
    read: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}

    def cutter(layer: str) -> Callable[..., torch.Tensor]:
        def cut(module: nn.Module, inputs: tuple[torch.Tensor, ...], output_BTO: torch.Tensor) -> torch.Tensor:
            if layer in made:
                raise _unplaced(name, layer, "the block calls it more than once")
            size_BTO = 0.25 + 0.5 * torch.rand(*entering_BTD.shape[:2], output_BTO.shape[-1], generator=generator)
            size_BTO[:, 1::2] *= -1
            read[layer] = inputs[0]
            made[layer] = size_BTO.reshape(output_BTO.shape).to(output_BTO).requires_grad_()
            return made[layer].clone()  # a leaf could not be added to in place

        return cut

    handles = [module.register_forward_hook(cutter(inner)) for inner, module in linears.items()]
    try:
        leaving_BTD = call(block, entering_BTD)
    finally:
        for handle in handles:
            handle.remove()
    unused = sorted(linears.keys() - made.keys())
    if unused:
        raise _unplaced(name, unused[0], "the block does not call it")
    return read, made, leaving_BTD


def _dependencies(tensor: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the leaves on which any number of the tensor depends."""
    import torch

    if not tensor.requires_grad:
        return []
    generator = torch.Generator().manual_seed(_SEED)
    seed = torch.randn(tensor.shape, generator=generator).to(tensor)  # a plain sum of normalized numbers is constant
    gradients = torch.autograd.grad(tensor, list(leaves.values()), seed, retain_graph=True, allow_unused=True)
    return [leaf for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None and gradient.any()]


def _components(name: str, reader: str, read: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> GroupSet:
    """Return the connected parts of the relation between the reader's columns and the sources' rows."""
    import torch

    num_columns = read.shape[-1]
    read_BTI = read.reshape(PROBES, -1, num_columns)
    weight_T = torch.linspace(0.5, 1.5, read_BTI.shape[1]).to(read_BTI)
    sizes = {source: made.shape[-1] for source, made in sources.items()}
    starts_E: list[torch.Tensor] = []
    ends_E: list[torch.Tensor] = []
    for first in range(0, num_columns, PROBES):
        column_C = torch.arange(first, min(first + PROBES, num_columns), device=read.device)
        seed_BTI = torch.zeros_like(read_BTI)
        seed_BTI[torch.arange(len(column_C)), :, column_C] = weight_T
        gradients = torch.autograd.grad(read, list(sources.values()), seed_BTI.view(read.shape), retain_graph=True)
        offset = num_columns
        for size, gradient in zip(sizes.values(), gradients, strict=True):
            copy_E, row_E = (gradient.reshape(PROBES, -1, size) != 0).any(1).nonzero(as_tuple=True)
            starts_E.append(column_C[copy_E])
            ends_E.append(row_E + offset)
            offset += size
    label_X = _smallest_connected(torch.cat(starts_E), torch.cat(ends_E), num_columns + sum(sizes.values()))
    first_G = torch.unique(label_X[:num_columns])  # of each group the first column
    members = []
    layers = [(source, 0, size) for source, size in sizes.items()]
    offset = num_columns
    for layer, axis, size in (*layers, (reader, 1, num_columns)):
        label_K = label_X[:num_columns] if axis else label_X[offset : offset + size]
        offset += 0 if axis else size
        group_K = torch.searchsorted(first_G, label_K).clamp_(max=len(first_G) - 1)
        stray_K = first_G[group_K] != label_K
        if stray_K.any():
            raise _unplaced(name, layer, f"no column of {reader} reads its row {int(stray_K.nonzero()[0])}")
        count_G = torch.bincount(group_K, minlength=len(first_G))
        if count_G.min() != count_G.max():
            raise _unplaced(name, layer, f"the groups around {reader} have {count_G.min()} to {count_G.max()} of it")
        members.append(Member(layer, axis, group_K.argsort(stable=True).view(len(first_G), -1)))
    return GroupSet(tuple(members))


def _smallest_connected(start_E: torch.Tensor, end_E: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Return for every node [X] the lowest number of a node that it is connected with."""
    import torch

    label_X = torch.arange(num_nodes, device=start_E.device)
    while True:
        lowest_E = torch.minimum(label_X[start_E], label_X[end_E])
        lower_X = label_X.scatter_reduce(0, start_E, lowest_E, "amin").scatter_reduce(0, end_E, lowest_E, "amin")
        if torch.equal(lower_X, label_X):
            return label_X
        label_X = lower_X


def _unplaced(block: str, layer: str, why: str) -> StepError:
    return StepError(f"{block}.{layer} fits into no group of rows and columns that go together: {why}", remedy=REMEDY)
