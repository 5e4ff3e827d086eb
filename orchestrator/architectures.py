"""Turning a model of Transformers into one whose parameters are named as the checkpoint stores them, and whose layers
in blocks are all plain `nn.Linear`, so that the walk and the export need to know no architecture.

Three things differ between modules and files:
- GPT-2's `Conv1D` holds, and stores, the transpose of a linear layer's weight;
- Transformers 5 keeps all experts of a block in two 3-D parameters, while checkpoints store each expert's matrices,
  for Mixtral under another name than the module's;
- old checkpoints leave out the name of the base model ("h.0…" instead of "transformer.h.0…").

The architectures in `KNOWN` are proved by the tests. Others are walked if their modules fit; `orchestrator.proof` then
compares them with stock Transformers before any compute.

Shape legend: T = tokens, D = model width, K = experts per token, O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KNOWN = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "opt",
        "gpt_neox",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
    }
)
# How the three matrices of an expert are stored: gate, up and down.
_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Modules that are stored under another name (Mixtral, GPT-NeoX): the name of the module, and the stored one.
_RENAMED = (("mlp", "block_sparse_moe"), ("lm_head", "embed_out"))


class UnfitError(Exception):
    """The modules cannot be brought to the stored form; the message says which."""


@dataclass(frozen=True)
class Adapted:
    """A model in stored form.

    root: the module whose parameters have the stored names.
    tied: parameters that need not be stored, and the one that each is the same as.
    transposed: layers whose stored weight is [I, O]. same_input: for all layers of experts, which of them read the
    very same tensor (gate and up of one expert; down alone).
    """

    root: nn.Module
    tied: Mapping[str, str]
    transposed: frozenset[str]
    same_input: tuple[tuple[str, ...], ...]


def adapt(model: Any, stored: Collection[str]) -> Adapted:
    """Bring `model`, on the meta device, to the form in which `stored` names its tensors; it is changed in place.

    Raises `UnfitError` for experts of a form that is not known.
    """
    root, tied = _without_missing_prefix(model, stored)
    for old, new in _RENAMED:
        if any(f".{new}." in f".{name}" for name in stored):
            _rename(root, old, new)
    transposed = _linear_for_conv1d(root)
    same_input = _unfuse_experts(root, stored)
    return Adapted(root, tied, transposed, same_input)


class Expert(nn.Module):
    """The three layers of one expert, by their stored names."""

    def __init__(self, names: tuple[str, str, str], num_in: int, num_inner: int, activation: Any) -> None:
        super().__init__()
        gate, up, down = names
        self.add_module(gate, nn.Linear(num_in, num_inner, bias=False, device="meta"))
        self.add_module(up, nn.Linear(num_in, num_inner, bias=False, device="meta"))
        self.add_module(down, nn.Linear(num_inner, num_in, bias=False, device="meta"))
        self.names = names
        self.activation = activation

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return the expert's output for the tokens that were routed to it."""
        gate, up, down = (self._modules[name] for name in self.names)
        assert gate is not None and up is not None and down is not None
        return down(self.activation(gate(hidden_TD)) * up(hidden_TD))  # type: ignore[no-any-return]


class UnfusedExperts(nn.ModuleList):
    """Stands for the fused experts of Transformers: the same sums in the same order, from one layer per matrix."""

    def forward(self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Add up what each token's experts put out, weighted. An expert without tokens is not called."""
        result_TD = torch.zeros_like(hidden_TD)
        for index, expert in enumerate(self.children()):
            position, token = torch.where((expert_TK == index).T)
            if token.numel():
                output = expert(hidden_TD[token]) * weight_TK[token, position, None]
                result_TD.index_add_(0, token, output.to(result_TD.dtype))
        return result_TD


def stored_state(model: Any, state: dict[str, torch.Tensor], stored: Collection[str]) -> dict[str, torch.Tensor]:
    """Return `state`, whose names are those of the modules of Transformers, under the names of a checkpoint.

    stored: the names of the checkpoint that `model` was loaded from.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(revert_weight_conversion(model, state))
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in stored):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _without_missing_prefix(model: Any, stored: Collection[str]) -> tuple[nn.Module, dict[str, str]]:
    """Return the module whose names are the stored ones: the base model, where its name is left out.

    What the model has beside the base model (the output head) is then hung into the base model.
    """
    tied, prefix, base = dict(model.all_tied_weights_keys), f"{model.base_model_prefix}.", model.base_model
    if base is model or any(name.startswith(prefix) for name in stored):
        return model, tied
    for name, child in model.named_children():
        if child is not base:
            base.add_module(name, child)
    return base, {name.removeprefix(prefix): other.removeprefix(prefix) for name, other in tied.items()}


def _rename(root: nn.Module, old: str, new: str) -> None:
    for name, module in list(root.named_modules()):
        child = module._modules.get(old)
        if child is not None and (hasattr(child, "experts") or not name):
            del module._modules[old]
            module.add_module(new, child)
            module.__dict__[old] = child  # the block's forward still calls it so; this is no second registration


def _linear_for_conv1d(root: nn.Module) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in root.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        conv: Any = root.get_submodule(name)
        num_in, num_out = conv.weight.shape
        root.set_submodule(name, nn.Linear(num_in, num_out, device="meta").requires_grad_(False))
    return frozenset(names)


def _unfuse_experts(root: nn.Module, stored: Collection[str]) -> tuple[tuple[str, ...], ...]:
    same_input: list[tuple[str, ...]] = []
    for name, module in list(root.named_modules()):
        gate_up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if gate_up is None or down is None or gate_up.ndim != 3:
            continue
        count, twice_inner, num_in = gate_up.shape
        names = _stored_names(name, stored)
        if len(module._parameters) > 2 or tuple(down.shape) != (count, num_in, twice_inner // 2):
            raise UnfitError(f"{name} ({type(module).__name__}) holds its experts in a form that is not known")
        experts = [Expert(names, num_in, twice_inner // 2, module.act_fn) for _ in range(count)]
        root.set_submodule(name, UnfusedExperts(experts).requires_grad_(False))
        for index in range(count):
            gate, up, down_name = (f"{name}.{index}.{leaf}" for leaf in names)
            same_input += [(gate, up), (down_name,)]
    return tuple(same_input)


def _stored_names(experts: str, stored: Collection[str]) -> tuple[str, str, str]:
    for names in _EXPERT_NAMES:
        if f"{experts}.0.{names[0]}.weight" in stored:
            return names
    raise UnfitError(f"the experts of {experts} are not stored one by one ({_listed(_EXPERT_NAMES)})")


def _listed(names: Sequence[Sequence[str]]) -> str:
    return " or ".join(", ".join(some) for some in names)
