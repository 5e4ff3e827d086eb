"""Scales of an fp8 KV cache in a checkpoint, as vLLM 0.33 reads them.

An engine that keeps keys and values in e4m3 stores k / k_scale and v / v_scale, one number each for every attention:

    model.layers.N.self_attn.k_scale, .v_scale     float32 [1], the dtype in which vLLM holds them
    config.json: quantization_config.kv_cache_scheme = `KV_CACHE_SCHEME`, which makes vLLM's ``kv_cache_dtype: auto``
        mean fp8 (`CompressedTensorsKVCacheMethod`); where the weights are dense, compression_config.kv_cache_scheme

Names and config.json are read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StepError
from orchestrator.layers import renumbered

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint import Checkpoint

# In the words of compressed-tensors: e4m3, one scale for the keys of a layer and one for its values.
KV_CACHE_SCHEME: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "dynamic": False,
    "symmetric": True,
}
# Where config.json speaks of the cache of a model with dense weights (`orchestrator.quantized` says why).
DENSE_ENTRY = "compression_config"
K_SUFFIX, V_SUFFIX = ".k_scale", ".v_scale"
# By name of an attention module: the scale of its keys, and that of its values.
KVScales = Mapping[str, tuple[float, float]]


def has_kv_scales(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the checkpoint holds scales of a KV cache."""
    entry = config.get("quantization_config") or config.get(DENSE_ENTRY)
    return isinstance(entry, Mapping) and bool(entry.get("kv_cache_scheme"))


def kv_scale_names(checkpoint: Checkpoint) -> set[str]:
    """Names of the stored scales; none if config.json does not speak of them."""
    if not has_kv_scales(checkpoint.config):
        return set()
    return {name for name in checkpoint.tensors if name.endswith((K_SUFFIX, V_SUFFIX))}


def read_kv_scales(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Return the scales of keys and values by name of the attention; {} for a checkpoint that has none.

    Raises `StepError` if an attention has only one of the two, or anything but one positive number.
    """
    from orchestrator.reader import TensorReader

    names = kv_scale_names(checkpoint)
    found = {}
    with TensorReader(checkpoint) as read:
        for attention in sorted({name.rpartition(".")[0] for name in names}):
            pair = [f"{attention}{suffix}" for suffix in (K_SUFFIX, V_SUFFIX)]
            for name in pair:
                if name not in names:
                    raise StepError(f"{attention} has no {name.rpartition('.')[2]}", where=str(checkpoint.path))
                if read(name).numel() != 1 or not 0 < float(read(name)) < float("inf"):
                    raise StepError(f"{name} is not one positive number", where=str(checkpoint.path))
            found[attention] = (float(read(pair[0])), float(read(pair[1])))
    return found


def scale_tensors(scales: KVScales) -> dict[str, torch.Tensor]:
    """Return what is stored, by name."""
    import torch

    return {
        f"{attention}{suffix}": torch.tensor([scale], dtype=torch.float32)
        for attention, pair in sorted(scales.items())
        for suffix, scale in zip((K_SUFFIX, V_SUFFIX), pair, strict=True)
    }


def renumbered_scales(scales: KVScales, blocks: Sequence[int] | None) -> dict[str, tuple[float, float]]:
    """The scales of the decoder blocks that are left, by their new names."""
    return {new: scales[old] for new, old in renumbered(scales, blocks).items()}


def check_kv_scales(after: Checkpoint, expected: KVScales | None, *, claimed: bool) -> dict[str, Any] | None:
    """Return what a manifest says of the scales; None if there are none.

    expected: those that had to be kept; None if there were none. claimed: whether the step says that it made them.

    Raises `StepError` if they are missing, are others than expected, or have become stale: a step that neither keeps
    nor makes them leaves none.
    """
    found = read_kv_scales(after)
    where = str(after.path)
    if not found:
        if claimed or expected is not None:
            raise StepError("the model has no scales of a KV cache, though it should", where=where)
        return None
    if not claimed and expected is None:
        raise StepError(
            "the model has scales of a KV cache, but the method's `provides` does not name kv_scales", where=where
        )
    for attention in sorted(found.keys() | (expected or {}).keys()):
        if not claimed and expected is not None and found.get(attention) != expected.get(attention):
            raise StepError(
                f"the KV scales of {attention} are {found.get(attention)}, not {expected.get(attention)}", where=where
            )
    return {**KV_CACHE_SCHEME, "layers": len(found)}
