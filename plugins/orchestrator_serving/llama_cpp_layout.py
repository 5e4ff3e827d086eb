"""How llama.cpp lays its KV cache out: no pages, but a row of cells for each slot, allocated when the server starts.

After src/llama-context.cpp, llama-kv-cache.cpp and llama-kv-cache-iswa.cpp (MIT) of the build in xllamacpp 2026.10, and
compared with what its server logs (tests/test_serving_llama_cpp.py). So the block of the plan is a slot: all cells of
one sequence in all layers. Slots are a multiple of 256 cells; layers with a sliding window have a cache of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api import CacheDtype, KVGroup, LayerCache, Layout, ModelShape, SpecError, heads_bytes

RULE = "llama.cpp (build 11549), one row of cells for each slot"
PADDING = 256  # cells
_WINDOWED = frozenset({"gemma2", "gemma3_text"})  # whose windows llama.cpp knows, of the families that we write as GGUF
_LEAVE_OUT = "leave llama_cpp out of `engines`"
PLAIN = ("float32", "float16", "bfloat16")
BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
BLOCK_ELEMENTS = 32


def padded(tokens: int) -> int:
    """Cells for so many tokens."""
    return -(-tokens // PADDING) * PADDING


@dataclass(frozen=True)
class LlamaCppLayout:
    """The rule. slot_tokens: of a slot; None: the longest sequence. ubatch: tokens that are computed at once.

    whole_windows: `--swa-full`, layers with a window keep every cell.
    """

    slot_tokens: int | None
    ubatch: int
    whole_windows: bool

    def __call__(self, shape: ModelShape, dtype: CacheDtype, block_size: int, devices: int, length: int) -> Layout:
        """Return the layout. Raises `SpecError` for what llama.cpp refuses, or is not written as GGUF."""
        if devices != 1:
            raise SpecError("the plan is for llama.cpp on one device", remedy="set tensor_parallel_size: 1")
        check_model(shape)
        _check_dtype(shape, dtype)
        cells = padded(self.slot_tokens or length)
        steps, parts = [], []
        for windowed in (False, True):
            layers = [cache for cache in shape.attending if _has_window(cache, shape) is windowed]
            if not layers:
                continue
            kept = cells
            if windowed and not self.whole_windows:
                window = max(cache.window or 0 for cache in layers)
                kept = padded(min(cells, window + self.ubatch))
            each = {heads_bytes(cache, dtype, 1) for cache in layers}
            size = kept * sum(heads_bytes(cache, dtype, 1) for cache in layers)
            kind = "sliding" if windowed else "full"
            steps.append(
                f"{len(layers)} {kind} layers x {kept} cells x {'/'.join(map(str, sorted(each)))} bytes of K and V "
                f"({dtype.name}) = {size} bytes per slot"
            )
            parts.append((kind, len(layers), size))
        total = sum(size for _, _, size in parts)
        group = KVGroup("full", len(shape.attending), cells, total // len(shape.attending))
        return Layout(RULE, (group,), total, steps=tuple(steps))


def check_model(shape: ModelShape) -> None:
    """Raises `SpecError` for a model that llama.cpp serves in another way, or that is not written as GGUF."""
    kinds = {cache.kind for cache in shape.caches} - {"full", "sliding"}
    if kinds or not shape.attending:
        raise SpecError(
            f"a model that keeps {', '.join(sorted(kinds)) or 'nothing'} of a layer is not written as GGUF here",
            remedy=_LEAVE_OUT,
        )
    positions = shape.max_position_embeddings
    for cache in shape.attending:
        if not _has_window(cache, shape) and (cache.window or positions) < positions:
            raise SpecError(
                f"llama.cpp ignores the sliding window of {cache.window} tokens of {shape.model_type}",
                remedy=_LEAVE_OUT,
            )


def _has_window(cache: LayerCache, shape: ModelShape) -> bool:
    return cache.kind == "sliding" and shape.model_type in _WINDOWED


def _check_dtype(shape: ModelShape, dtype: CacheDtype) -> None:
    if dtype.name not in (*PLAIN, *BLOCKS):
        raise SpecError(
            f"llama.cpp keeps no KV cache in {dtype.name}",
            remedy=f"set kv_cache_dtype to one of {', '.join((*PLAIN, *BLOCKS))}",
        )
    for cache in shape.attending:
        if dtype.name in BLOCKS and (cache.head_dim % BLOCK_ELEMENTS or cache.head_dim_v % BLOCK_ELEMENTS):
            raise SpecError(
                f"llama.cpp quantizes keys and values in blocks of {BLOCK_ELEMENTS}, which do not divide heads of "
                f"{cache.head_dim}",
                remedy="set kv_cache_dtype: float16",
            )
