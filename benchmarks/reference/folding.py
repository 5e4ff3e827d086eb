"""Which norm or layer of a Llama block produces what a stage reads, and dividing it by a scale.

v produces what o reads only where every query head has its own KV head.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.reference.model import STAGES


def producer(model: Any, block: Any, stage: tuple[str, ...]) -> Any:
    """Return the module that can be divided by a scale of the stage's input, or None."""
    config = model.config
    own_heads = config.num_attention_heads == config.num_key_value_heads
    return {
        STAGES[0]: block.input_layernorm,
        STAGES[1]: block.self_attn.v_proj if own_heads else None,
        STAGES[2]: block.post_attention_layernorm,
        STAGES[3]: block.mlp.up_proj,
    }[stage]


def divide(model: Any, module: Any, scale_I: torch.Tensor) -> torch.Tensor:
    """Divide what a module puts out; return the scale that remains after rounding to the stored dtype.

    A norm is stored as it is now, so that it is rounded. A layer's weight is yet to be compressed, and is not.
    """
    if module.weight.ndim == 2:
        module.weight.data /= scale_I[:, None]
        return scale_I
    before_I = module.weight.data
    module.weight.data = (before_I / scale_I).to(model.stored_dtype).to(before_I.dtype)
    usable_I = (before_I != 0) & (module.weight.data != 0)
    return torch.where(usable_I, before_I / module.weight.data, scale_I)
