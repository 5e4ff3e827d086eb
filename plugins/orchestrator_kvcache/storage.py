"""What the policies share: which models they serve, and what tensors take.

Every policy keeps all layers alike, also those with a sliding window of their own: engines have one pool for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.api import ModelShape, SpecError, StepError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def element_bytes(shape: ModelShape) -> int:
    """Bytes of one element of the dtype that the model computes in. Raises `SpecError` for a dtype it cannot."""
    if shape.dtype not in ELEMENT_BYTES:
        raise SpecError(f"no model computes in {shape.dtype}", remedy=f"one of: {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[shape.dtype]


def elements_per_token(shape: ModelShape) -> int:
    """Elements of the keys of one token over all layers; the values have as many."""
    return shape.num_layers * shape.num_kv_heads * shape.head_dim


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind `tensors`; what is behind several of them counts once.

    A view counts as all that it keeps alive, so that a window cut out of a longer tensor cannot pass for a small one.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for address, size in storages.items() if address)


def compact(tensor: Tensor) -> Tensor:
    """Return the tensor with no memory behind it but its own: a copy where it is a part of a larger one."""
    import torch

    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def refuse_unserved(config: Mapping[str, Any]) -> None:
    """Raise `SpecError` for a model whose cache is not keys and values of one width for each token and layer."""
    reason = _unserved(config)
    if reason:
        raise SpecError(reason, remedy="leave the policy out: Transformers' own cache serves this model")


def refuse_unserved_model(model: PreTrainedModel) -> None:
    """The same for a loaded model. Raises `StepError`."""
    reason = _unserved(model.config.to_dict())
    if reason:
        raise StepError(reason, remedy="leave the policy out: Transformers' own cache serves this model")


def _unserved(config: Mapping[str, Any]) -> str | None:
    family = config.get("model_type")
    if config.get("kv_lora_rank"):
        return f"{family} caches latents (multi-head latent attention), not keys and values of heads"
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{family} has layers of type {', '.join(sorted(kinds))}, which no cache policy here serves"
    if config.get("num_kv_shared_layers"):
        return f"{family} shares keys and values between layers, which no cache policy here serves"
    return None
