"""A model without its weights, whose parts are filled from disk one at a time.

The modules are those of Transformers, built on the meta device; only what cannot be read from the checkpoint (the
rotary tables) is real. Weights are read by name with memory mapping, so that no more than the parts in use are in
memory. Dense decoder-only models are supported whose stored tensors have the names and shapes of the modules:
Llama, Mistral, Qwen2, Qwen3 and their like. Everything else (mixtures of experts, GPT-2's transposed layers, models
that feed token-dependent extras into every block) is refused by name.

Shape legend: B = sequences of a batch, T = tokens of a sequence, D = model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import PreflightError
from orchestrator.model import load_config, quiet
from orchestrator.reader import TensorReader

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orchestrator.checkpoint import Checkpoint

_REMEDY = "use a dense Llama-, Mistral- or Qwen-like model"


@dataclass(frozen=True)
class Block:
    """A decoder block: its full name, its module, and its linear layers by full name in the order of the module."""

    name: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]


class _Captured(Exception):  # noqa: N818 - a signal, not an error
    """Stops the forward pass once the last block has been reached."""


class Skeleton:
    """The model on the meta device and its blocks; weights come and go with `load` and `release`.

    Weights are cast to the checkpoint's dtype, as the loaded model has them, and then to float32, in which all
    forward passes are made.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.checkpoint = checkpoint
        config = load_config(checkpoint)
        try:
            with quiet(), torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._refusal(f"Transformers cannot build it: {error}") from error
        self.model.eval().requires_grad_(False)
        self._make_buffers_real()
        self._check_names()
        self.blocks = self._find_blocks()
        self._read = TensorReader(checkpoint)

    def linear_names(self) -> list[str]:
        """Full names of all linear layers of the model, the output head included."""
        from torch import nn

        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def load(self, name: str) -> None:
        """Fill the parameters of the module called `name` (a block, or a single layer) from the checkpoint."""
        from torch import nn

        for owner, leaf, full in _parameters(self.model.get_submodule(name), name):
            weight = self._read(full).to(self.checkpoint.torch_dtype).float()
            owner._parameters[leaf] = nn.Parameter(weight.contiguous(), requires_grad=False)

    def release(self, name: str) -> None:
        """Forget the parameters of the module called `name`."""
        from torch import nn

        for owner, leaf, _ in _parameters(self.model.get_submodule(name), name):
            parameter = owner._parameters[leaf]
            assert parameter is not None
            owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def close(self) -> None:
        """Close the weight files."""
        self._read.close()

    def capture(self, tokens_BT: torch.Tensor, embed: Callable[..., Any]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run the model up to its blocks: return what enters the first block [B, T, D] and every block's arguments.

        The model's own forward is run with blocks that pass their input on, so that each block gets the mask
        (full or sliding), rotary tables and positions that it would really get. embed: maps token ids to embeddings.
        """
        base = self.model.base_model
        arguments: list[dict[str, Any]] = []
        hidden: list[torch.Tensor] = []

        def record(hidden_BTD: torch.Tensor, *extra: Any, **kwargs: Any) -> torch.Tensor:
            if extra:
                raise self._refusal("its blocks take positional arguments")
            arguments.append(kwargs)
            if len(arguments) == len(self.blocks):
                hidden.append(hidden_BTD)
                raise _Captured
            return hidden_BTD

        for block in self.blocks:
            block.module.forward = record
        try:
            base(inputs_embeds=embed(tokens_BT).float(), use_cache=False)
        except _Captured:
            pass
        finally:
            for block in self.blocks:
                del block.module.forward
        if len(arguments) != len(self.blocks):
            raise self._refusal(f"{len(arguments)} of its {len(self.blocks)} blocks took part in the forward pass")
        return hidden[0], arguments

    def _refusal(self, what: str) -> PreflightError:
        kind = self.checkpoint.config["model_type"]
        return PreflightError(f"{self.checkpoint.path} (model_type {kind!r}): {what}", remedy=_REMEDY)

    def _make_buffers_real(self) -> None:
        """Rebuild off the meta device every module that owns buffers which no checkpoint stores."""
        for name, module in list(self.model.named_modules()):
            if not module._buffers or not module._non_persistent_buffers_set:
                continue
            try:
                real = type(module)(config=self.model.config)
            except TypeError:
                raise self._refusal(f"{name} ({type(module).__name__}) holds tables that cannot be rebuilt") from None
            self.model.set_submodule(name, real)

    def _check_names(self) -> None:
        """Refuse a checkpoint whose tensors are not, name by name and shape by shape, those of the modules."""
        stored = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        tied = set(self.model.all_tied_weights_keys)
        missing = sorted(name for name in wanted if name not in stored and name not in tied)
        # Old Llama checkpoints store the rotary table, which is recomputed.
        extra = sorted(name for name in stored if name not in wanted and not name.endswith("rotary_emb.inv_freq"))
        wrong = sorted(name for name in wanted if name in stored and stored[name] != wanted[name])
        if wrong:
            name = wrong[0]
            raise self._refusal(f"{name} has shape {stored[name]}, but config.json means {wanted[name]}")
        if missing:
            raise self._refusal(f"tensor {missing[0]} is missing ({len(missing)} in all)")
        if extra:
            raise self._refusal(f"no module takes the stored tensor {extra[0]} ({len(extra)} in all)")

    def _find_blocks(self) -> list[Block]:
        from torch import nn

        count = getattr(self.model.config, "num_hidden_layers", None)
        base = self.model.base_model
        lists = [child for child in base.children() if isinstance(child, nn.ModuleList) and len(child) == count]
        if len(lists) != 1:
            raise self._refusal("its decoder blocks were not found")
        names = {module: name for name, module in self.model.named_modules()}
        blocks = []
        for module in lists[0]:
            name = names[module]
            for owner, leaf, full in _parameters(module, name):
                parameter = owner._parameters[leaf]
                if parameter is not None and parameter.ndim > 1 and not isinstance(owner, nn.Linear):
                    raise self._refusal(f"{full} belongs to a {type(owner).__name__}, not to a linear layer")
            linears = {names[inner]: inner for inner in module.modules() if isinstance(inner, nn.Linear)}
            blocks.append(Block(name, module, linears))
        return blocks


def _parameters(module: nn.Module, prefix: str) -> list[tuple[nn.Module, str, str]]:
    """Return (owner, name within the owner, full name) of every parameter of `module`."""
    found = []
    for inner_name, owner in module.named_modules():
        for leaf in owner._parameters:
            if owner._parameters[leaf] is not None:
                found.append((owner, leaf, ".".join(part for part in (prefix, inner_name, leaf) if part)))
    return found
