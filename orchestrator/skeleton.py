"""A model without its weights, whose parts are filled from disk one at a time.

The modules are those of Transformers, built on the meta device and brought to the form of the stored tensors
(`orchestrator.architectures`); only what cannot be read from the checkpoint (the rotary tables) is real. Weights are
read by name, so that no more than the parts in use are in memory. What does not fit, name by name
and shape by shape, is refused by name.

Shape legend: B = sequences of a batch, T = tokens of a sequence, D = model width, O = out features, I = in features.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.blocks import decoder_blocks
from orchestrator.errors import PreflightError
from orchestrator.kv_scales import kv_scale_names
from orchestrator.layers import is_router, unsupported
from orchestrator.model import COPY_AGAIN, load_config, quiet
from orchestrator.reader import TensorReader
from orchestrator.remote_code import CONFIG, MODEL, own_class

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orchestrator.checkpoint import Checkpoint

REMEDY = "use a model like Llama, Mistral, Mixtral, Qwen, Gemma, Phi-3, GPT-2, OPT or Pythia, stored as published"
# Tables that Transformers computes anew, which old checkpoints store all the same.
_IGNORED = (r"rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class Block:
    """A decoder block: number, full name, module, and its linear layers by stored name in the order of the module.

    transposed: layers whose stored weight is [I, O].
    experts: layers that see only the tokens that were routed to them, possibly none.
    same_input: for the layers of `experts`, those that read the very same tensor; every one is in just one set.
    """

    index: int
    name: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    transposed: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    same_input: tuple[tuple[str, ...], ...] = ()

    def run(self, hidden_BTD: torch.Tensor, arguments: Mapping[str, Any]) -> Any:
        """Return the hidden states that the block puts out; some put out a tuple that begins with them."""
        output = self.module(hidden_BTD, **arguments)
        return output[0] if isinstance(output, tuple | list) else output


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """Stops the forward pass once the last block has been reached."""


class Skeleton:
    """The model on the meta device and its blocks; weights come and go with `load` and `release`.

    Weights are cast to the checkpoint's dtype, as the loaded model has them, and then to float32, in which all
    forward passes are made. `model` has the names of the stored tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from orchestrator.architectures import KNOWN, UnfitError, adapt

        self.checkpoint = checkpoint
        config = load_config(checkpoint)
        model = build_empty(checkpoint, config)
        # If it is not known, or brings its own code, `orchestrator.proof` has to vouch for it.
        self.is_known = config.model_type in KNOWN and checkpoint.code is None
        self._ignored = (*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))
        self._whole: Any = model
        self.base = model.base_model
        for owner, entry in ((config, "num_hidden_layers"), (self.base.config, "hidden_size")):
            if type(getattr(owner, entry, None)) is not int:  # of a configuration that came with the model
                raise self._refusal(f"its configuration gives no {entry}")
        inner = set(self.base.modules())
        try:
            adapted = adapt(model, checkpoint.tensors.keys())
            self.model: Any = adapted.root
            self._transposed = adapted.transposed
            self._tied = adapted.tied
            self._check_names()
            self.blocks = self._find_blocks(config.num_hidden_layers, adapted.same_input)
        except UnfitError as error:
            raise self._refusal(str(error)) from error
        inside = {module for block in self.blocks for module in block.module.modules()}
        around = inner - inside - {self.base.get_input_embeddings()}
        self._before_blocks = [entry for entry in _tensors(self.model, "") if entry[0] in around]
        self._read = TensorReader(checkpoint)

    def linear_names(self) -> list[str]:
        """Full names of all linear layers of the model, the output head included."""
        from torch import nn

        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def stored_ties(self) -> list[tuple[str, str]]:
        """Pairs of stored tensors that config.json says are one and the same."""
        stored = self.checkpoint.tensors
        return [(name, other) for name, other in self._tied.items() if name in stored and other in stored]

    @property
    def width(self) -> int:
        """Width D of the hidden states between blocks."""
        return int(self.base.config.hidden_size)

    def load(self, name: str, device: str = "cpu") -> None:
        """Fill the parameters of the module called `name` (a block, or a single layer) from the checkpoint."""
        for owner, leaf, full in _tensors(self.model.get_submodule(name), name):
            self._fill(owner, leaf, full, device)

    def prefetch(self, name: str) -> None:
        """Let the kernel read a module's parameters into its cache while something else is computed."""
        self._read.prefetch(full for _, _, full in _tensors(self.model.get_submodule(name), name))

    @contextmanager
    def embedding_rows(self, ids: Sequence[int]) -> Iterator[nn.Module]:
        """Give the token embedding with these rows alone, numbered from 0, so that the table is never in memory."""
        from torch import nn

        module = self.model.get_input_embeddings()
        names = {other: name for name, other in self.model.named_modules()}
        rows = self._read.rows(f"{names[module]}.weight", ids).to(self.checkpoint.torch_dtype).float()
        before, padding = module._parameters["weight"], module.padding_idx
        module._parameters["weight"], module.padding_idx = nn.Parameter(rows, requires_grad=False), None
        try:
            yield module
        finally:
            module._parameters["weight"], module.padding_idx = before, padding

    @property
    def vocabulary(self) -> int:
        """Number of the logits V."""
        return int(self._whole.get_output_embeddings().out_features)

    @contextmanager
    def head(self, device: str, *, in_tuple: bool) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Give what makes logits [B, T, V] of what the last block puts out [B, T, D]: the model's norm and head.

        in_tuple: whether blocks put out a tuple. May be called from several threads.
        """
        inside = {module for block in self.blocks for module in block.module.modules()}
        outside = inside | {self.base.get_input_embeddings()}
        entries = [entry for entry in _tensors(self.model, "") if entry[0] not in outside]
        for owner, leaf, full in entries:
            self._fill(owner, leaf, full if full in self.checkpoint.tensors else self._tied[full], device)

        current = threading.local()
        embedding_width = self.base.get_input_embeddings().embedding_dim  # OPT's can be another than D

        def stand_in(*inputs: Any, **kwargs: Any) -> Any:
            return (current.hidden_BTD,) if in_tuple else current.hidden_BTD

        def logits(hidden_BTD: torch.Tensor) -> torch.Tensor:
            # The model's own forward pass, in which blocks put out what is given instead of what they would.
            current.hidden_BTD = hidden_BTD
            ignored_BTE = hidden_BTD.new_zeros((*hidden_BTD.shape[:2], embedding_width))
            output = self._whole(inputs_embeds=ignored_BTE, use_cache=False)
            return output.logits  # type: ignore[no-any-return]

        for block in self.blocks:
            block.module.forward = stand_in
        try:
            yield logits
        finally:
            for block in self.blocks:
                del block.module.forward
            for owner, leaf, _ in entries:
                _put(owner, leaf, getattr(owner, leaf).detach().to("meta"))

    def release(self, name: str) -> None:
        """Forget the parameters of the module called `name`."""
        for owner, leaf, _ in _tensors(self.model.get_submodule(name), name):
            _put(owner, leaf, getattr(owner, leaf).detach().to("meta"))

    def as_stored(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the weight of the layer called `name` the way round in which its tensor is stored."""
        return weight_OI.T.contiguous() if name in self._transposed else weight_OI

    def close(self) -> None:
        """Close the weight files."""
        self._read.close()

    def capture(self, tokens_BT: torch.Tensor, embed: Callable[..., Any]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run the model up to its blocks: return what enters the first block [B, T, D] and every block's arguments.

        The model's own forward is run with blocks that pass their input on, so that each block gets the mask
        (full or sliding), rotary tables and positions that it would really get. embed: maps token ids to embeddings.
        What else comes before the blocks (position tables, projections) is loaded for the time being.
        """
        arguments: list[dict[str, Any]] = []
        hidden: list[torch.Tensor] = []

        def stand_in(names: list[str]) -> Callable[..., torch.Tensor]:
            """A forward pass for a block whose parameters have `names`; positional ones are noted by their names."""

            def record(*inputs: Any, **kwargs: Any) -> torch.Tensor:
                given = {**dict(zip(names, inputs, strict=False)), **kwargs}
                hidden.append(given.pop(names[0]))
                arguments.append(given)
                if len(arguments) == len(self.blocks):
                    raise _Captured
                return hidden[-1]

            return record

        for owner, leaf, full in self._before_blocks:
            self._fill(owner, leaf, full)
        for block in self.blocks:
            block.module.forward = stand_in(list(inspect.signature(block.module.forward).parameters))
        try:
            self.base(inputs_embeds=embed(tokens_BT).float(), use_cache=False)
        except _Captured:
            pass
        finally:
            for block in self.blocks:
                del block.module.forward
            for owner, leaf, _ in self._before_blocks:
                _put(owner, leaf, getattr(owner, leaf).detach().to("meta"))
        if len(arguments) != len(self.blocks):
            raise self._refusal(f"{len(arguments)} of its {len(self.blocks)} blocks took part in the forward pass")
        return hidden[0], arguments

    def _fill(self, owner: nn.Module, leaf: str, full: str, device: str = "cpu") -> None:
        tensor = self._read(full)
        if tensor.is_floating_point():
            tensor = tensor.to(self.checkpoint.torch_dtype).float()
        if leaf == "weight" and full.removesuffix(".weight") in self._transposed:
            tensor = tensor.T
        _put(owner, leaf, tensor.contiguous().to(device))

    def _refusal(self, what: str, remedy: str = REMEDY) -> PreflightError:
        return _refusal(self.checkpoint, what, remedy)

    def _check_names(self) -> None:
        """Refuse a checkpoint whose tensors are not, name by name and shape by shape, those of the modules."""
        scales = kv_scale_names(self.checkpoint)
        stored = {name: info.shape for name, info in self.checkpoint.tensors.items() if name not in scales}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for layer in self._transposed:
            wanted[f"{layer}.weight"] = wanted[f"{layer}.weight"][::-1]
        missing = sorted(name for name in wanted if name not in stored and name not in self._tied)
        extra = sorted(name for name in stored if name not in wanted and not self._is_ignored(name))
        wrong = sorted(name for name in wanted if name in stored and stored[name] != wanted[name])
        if wrong:
            name = wrong[0]
            raise self._refusal(f"{name} has shape {stored[name]}, but config.json means {wanted[name]}", COPY_AGAIN)
        if missing:
            raise self._refusal(f"tensor {missing[0]} is missing ({len(missing)} in all)", COPY_AGAIN)
        if extra:
            raise self._refusal(f"no module takes the stored tensor {extra[0]} ({len(extra)} in all)")

    def _is_ignored(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self._ignored)

    def _find_blocks(self, count: int, same_input: tuple[tuple[str, ...], ...]) -> list[Block]:
        from torch import nn

        blocks: list[Block] = []
        try:
            names = decoder_blocks(self.model, count)
        except PreflightError as error:
            raise self._refusal(error.problems[0].what) from None
        for name in names:
            module = self.model.get_submodule(name)
            linears = {
                f"{name}.{inner}": layer
                for inner, layer in module.named_modules()
                if isinstance(layer, nn.Linear) and not is_router(inner)
            }
            for owner, leaf, full in _tensors(module, name):
                matrix = getattr(owner, leaf).ndim > 1
                if matrix and not isinstance(owner, nn.Linear) and not is_router(full.rpartition(".")[0]):
                    raise self._refusal(f"{full} belongs to a {type(owner).__name__}, not to a linear layer")
            groups = tuple(group for group in same_input if group[0] in linears)
            experts = frozenset(layer for group in groups for layer in group)
            blocks.append(Block(len(blocks), name, module, linears, self._transposed & linears.keys(), experts, groups))
        self._check_layers(blocks)
        return blocks

    def _check_layers(self, blocks: list[Block]) -> None:
        """Planning, export and checks know the layers by their stored names alone: they must be the same ones."""
        by_name = {layer.name: (layer.out_features, layer.in_features) for layer in self.checkpoint.block_layers()}
        by_module = {
            name: (layer.out_features, layer.in_features) for block in blocks for name, layer in block.linears.items()
        }
        if by_name != by_module:
            differing = sorted(name for name, _ in by_name.items() ^ by_module.items())
            raise self._refusal(f"{differing[0]} is not stored as a linear layer of its blocks")


def build_empty(checkpoint: Checkpoint, config: Any) -> Any:
    """Return the model that Transformers makes from a configuration: parameters on the meta device, tables real.

    config: an object of Transformers, or the content of a config.json. checkpoint: whose it is, for messages.
    Raises `PreflightError` if there is no such model, or none that is a causal language model.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fault = unsupported(checkpoint.config)
    if fault:
        raise PreflightError(f"{checkpoint.path}: {fault[0]}", remedy=fault[1])
    try:
        with quiet():
            if isinstance(config, Mapping):
                kind = own_class(checkpoint, CONFIG) or CONFIG_MAPPING[config["model_type"]]
                config = kind.from_dict(dict(config))
            own = own_class(checkpoint, MODEL)
            with torch.device("meta"):
                if own:
                    model = own._from_config(config, dtype=torch.float32)
                else:
                    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except PreflightError:
        raise
    except Exception as error:  # configurations check themselves, each in its own way
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise _refusal(checkpoint, f"Transformers cannot build it: {said[-1].strip()}") from error
    model.eval().requires_grad_(False)
    for name, module in model.named_modules():  # tables that no checkpoint stores, as when a model is loaded
        tables = [key for key in module._non_persistent_buffers_set if module._buffers[key] is not None]
        for key in tables:
            table = torch.empty_like(module._buffers[key], device="cpu")
            module._buffers[key] = table.fill_(torch.nan) if table.is_floating_point() else table.zero_()
        if tables:
            with torch.no_grad():
                model._init_weights(module)
        if not all(module._buffers[key].isfinite().all() for key in tables):
            raise _refusal(checkpoint, f"{name} ({type(module).__name__}) holds tables that cannot be rebuilt")
    return model


def stored_shapes(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[int, ...]]:
    """Return, by the names of the checkpoint's tensors, the shapes that the modules of `model` mean; it is changed.

    model: as `build_empty` returns it, with the blocks of the checkpoint. Raises `PreflightError` for another form.
    """
    from orchestrator.architectures import UnfitError, adapt

    try:
        adapted = adapt(model, checkpoint.tensors.keys())
    except UnfitError as error:
        raise _refusal(checkpoint, str(error)) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in adapted.root.state_dict().items()}
    for layer in adapted.transposed:
        shapes[f"{layer}.weight"] = shapes[f"{layer}.weight"][::-1]
    return {name: shape for name, shape in shapes.items() if name in checkpoint.tensors}


def _refusal(checkpoint: Checkpoint, what: str, remedy: str = REMEDY) -> PreflightError:
    kind = checkpoint.config["model_type"]
    return PreflightError(f"{checkpoint.path} (model_type {kind!r}): {what}", remedy=remedy)


def _tensors(module: nn.Module, prefix: str) -> list[tuple[nn.Module, str, str]]:
    """Return (owner, name within the owner, full name) of everything of `module` that is stored."""
    found = []
    for inner_name, owner in module.named_modules():
        buffers = [key for key in owner._buffers if key not in owner._non_persistent_buffers_set]
        for leaf in (*owner._parameters, *buffers):
            if getattr(owner, leaf) is not None:
                found.append((owner, leaf, ".".join(part for part in (prefix, inner_name, leaf) if part)))
    return found


def _put(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> None:
    from torch import nn

    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
