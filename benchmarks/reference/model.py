"""A Llama as a whole in float64 (float32: to see what that changes), and what its layers read.

Transformers computes norms and rotary angles in float32 whatever the model's dtype; all else is float64.

Shape legend: N = sequences, T = tokens (of all sequences, where N is not there), D = width, O = out, I = in features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

# Layers of a block in the order in which they run; those of a row read the same input.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What a method makes of a weight [O, I], given its inputs [T, I]."""


def load(folder: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Return the model; arithmetic on it is in `dtype`. `stored_dtype`: the checkpoint's, in which results are kept."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.stored_dtype = model.dtype
    return model.to(dtype).requires_grad_(False)


def layers_of(block: nn.Module, stage: Sequence[str], skip: Sequence[str]) -> dict[str, Any]:
    """Return those linear layers of a stage that are compressed; `skip` has last parts of names."""
    return {name: block.get_submodule(name) for name in stage if name.rpartition(".")[2] not in skip}


def each_layer(model: Any, skip: Sequence[str]) -> Iterator[Any]:
    """All layers that are compressed, one after the other."""
    for block in model.model.layers:
        for stage in STAGES:
            yield from layers_of(block, stage, skip).values()


def store(model: Any, layer: Any, weight_OI: torch.Tensor) -> None:
    """Put a weight into its layer as a checkpoint would hold it."""
    layer.weight.data = weight_OI.to(model.stored_dtype).to(weight_OI.dtype)


class _EnoughError(Exception):
    """What was wanted has been seen; nothing beyond it need be run."""


class Blocks:
    """Passes calibration tokens through the blocks one after the other, one sequence at a time."""

    def __init__(self, model: Any, tokens_NT: torch.Tensor) -> None:
        self.model = model
        self.entering: list[torch.Tensor] = []  # [1, T, D] for each sequence
        self.arguments: dict[str, Any] = {}

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.entering.append(args[0])
            self.arguments = kwargs
            raise _EnoughError

        handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        with torch.no_grad():
            for tokens_T in tokens_NT:
                with contextlib.suppress(_EnoughError):
                    model(tokens_T[None], use_cache=False)
        handle.remove()

    @torch.no_grad()
    def inputs(self, block: Any, stage: Sequence[str]) -> torch.Tensor:
        """Return what the layers of a stage read [T, I], with the block's weights as they are now."""
        seen: list[torch.Tensor] = []

        def catch(module: nn.Module, args: Any) -> None:
            seen.append(args[0][0])
            raise _EnoughError

        handle = block.get_submodule(stage[0]).register_forward_pre_hook(catch)
        for hidden_1TD in self.entering:
            with contextlib.suppress(_EnoughError):
                block(hidden_1TD, **self.arguments)
        handle.remove()
        return torch.cat(seen)

    @torch.no_grad()
    def go_on(self, block: Any) -> None:
        """Replace what enters this block by what it puts out."""
        outputs = [block(hidden_1TD, **self.arguments) for hidden_1TD in self.entering]
        self.entering = [output[0] if isinstance(output, tuple) else output for output in outputs]


def compress_in_turn(model: Any, tokens_NT: torch.Tensor, change: Change, skip: Sequence[str] = ()) -> None:
    """Replace every layer's weight, each on the inputs that the compressed layers before it produce.

    As in GPTQ's and SparseGPT's papers, and within a block too ("true sequential" in GPTQ's code).
    """
    blocks = Blocks(model, tokens_NT)
    for block in model.model.layers:
        for stage in STAGES:
            layers = layers_of(block, stage, skip)
            if layers:
                input_TI = blocks.inputs(block, stage)
                for layer in layers.values():
                    store(model, layer, change(layer.weight.data, input_TI))
        blocks.go_on(block)
