"""How OpenVINO's CPU plugin lays the blocks of its paged cache out, 2026.4.

After intel_cpu/src/transformations/transformation_pipeline.cpp of OpenVINO and continuous_batching/cache of OpenVINO
GenAI (Apache-2.0), and compared with what a running pipeline reports (tests/test_serving_openvino.py). A block holds 32
tokens of every layer; layers with a sliding window keep all of them.

Integers have a float32 scale and zero point each, 8 bytes: values for every token and head; keys for every channel of a
block, or like values if KEY_CACHE_QUANT_MODE is BY_TOKEN.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api import CacheDtype, KVGroup, Layout, ModelShape, SpecError, every_layer_in_full

BLOCK_TOKENS = 32
RULE = "OpenVINO 2026.4, CPU"
_SCALE_BYTES = 8
_BITS = {"u8": 8, "u4": 4}
_PLAIN = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class OpenVINOLayout:
    """The rule. keys_by_channel: whether integer keys have a scale for each channel."""

    keys_by_channel: bool = True

    def __call__(self, shape: ModelShape, dtype: CacheDtype, block_size: int, devices: int, length: int) -> Layout:
        """Return the layout. Raises `SpecError` for what OpenVINO GenAI does not serve on a CPU, or in another way."""
        if devices != 1:
            raise SpecError("OpenVINO GenAI serves a model on one CPU", remedy="set tensor_parallel_size: 1")
        kinds = {cache.kind for cache in shape.caches} - {"full", "sliding"}
        if kinds or not shape.attending:
            raise SpecError(
                f"how OpenVINO keeps {', '.join(sorted(kinds)) or 'nothing'} of a layer is not known here",
                remedy="leave openvino_genai out of `engines`",
            )
        if dtype.name in _PLAIN:
            whole = every_layer_in_full(shape, dtype, BLOCK_TOKENS, 1, length)
            return Layout(RULE, whole.groups, whole.bytes_per_block, steps=whole.steps)
        if dtype.name not in _BITS:
            raise SpecError(
                f"OpenVINO keeps no KV cache in {dtype.name}",
                remedy=f"set kv_cache_dtype to one of {', '.join((*_PLAIN, *_BITS))}",
            )
        bits = _BITS[dtype.name]
        total, steps = 0, []
        kinds_of_heads = {(cache.head_dim, cache.head_dim_v): 0 for cache in shape.attending}
        for cache in shape.attending:
            kinds_of_heads[cache.head_dim, cache.head_dim_v] += cache.num_kv_heads
        for (key, value), heads in kinds_of_heads.items():
            scales = key if self.keys_by_channel else BLOCK_TOKENS
            keys = BLOCK_TOKENS * key * bits // 8 + scales * _SCALE_BYTES
            values = BLOCK_TOKENS * (value * bits // 8 + _SCALE_BYTES)
            total += heads * (keys + values)
            steps.append(
                f"{heads} KV heads of all layers x (keys {BLOCK_TOKENS} x {key} x {bits}/8 + {scales} x {_SCALE_BYTES} "
                f"of scales + values {BLOCK_TOKENS} x ({value} x {bits}/8 + {_SCALE_BYTES})) = "
                f"{heads * (keys + values)} bytes per block of {BLOCK_TOKENS} tokens"
            )
        group = KVGroup("full", len(shape.attending), BLOCK_TOKENS, total // len(shape.attending))
        return Layout(RULE, (group,), total, steps=tuple(steps))
