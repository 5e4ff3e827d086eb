"""KV-cache arithmetic: bytes per token, blocks and concurrency for the attention kinds that are understood.

Pure integers, no torch, no GPU. A KV cache holds, for every token and every layer that attends,

    grouped-query attention   2 (K and V) x KV heads x head_dim        elements
    multi-head latent (MLA)   kv_lora_rank + qk_rope_head_dim          elements (one latent, never x 2, never x heads)

and an engine hands it out in blocks of `block_size` tokens. Sliding-window layers are charged for every token of a
sequence: engines keep one pool of equal pages for all layers, so counting only the window promises memory that is
not there. For such models the concurrency given here is a lower bound.

What is not understood is refused: a wrong number here is an out-of-memory error in production.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.errors import PreflightError, SpecError
from orchestrator.quantized import read_groups
from orchestrator.scheme import QuantScheme

GIB = 2**30
# Beyond these there is no accelerator, no block and no model, and floats would overflow.
MOST_GIB = 100_000
MOST_BLOCK_TOKENS = 2**20
MOST_COUNT = 2**40
LEAVE_OUT = "leave the serving configuration out of the specification"
# Families whose K and V are [tokens, KV heads, head_dim] in every layer, by what Transformers takes a missing key for:
# `num_key_value_heads` means one KV head per attention head, `head_dim` means hidden_size / num_attention_heads;
ONE_KV_HEAD_PER_HEAD = frozenset({"granite", "llama", "olmo2", "phi3"})
# only `head_dim` means that;
DIVIDING_FAMILIES = ONE_KV_HEAD_PER_HEAD | {"ministral", "mistral", "mixtral", "qwen2", "qwen2_moe", "starcoder2"}
# neither does: the configuration must say.
STATING_FAMILIES = frozenset({"gemma", "gemma2", "gemma3_text", "gpt_oss", "qwen3", "qwen3_moe"})
MLA_FAMILIES = frozenset({"deepseek_v2", "deepseek_v3"})
FAMILIES = DIVIDING_FAMILIES | STATING_FAMILIES | MLA_FAMILIES
ELEMENT_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
KV_CACHE_DTYPES = ("auto", *ELEMENT_BYTES)


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a model's KV cache.

    num_kv_heads, head_dim: of the cache; latent attention caches one head of kv_lora_rank + qk_rope_head_dim.
    windows: per layer the sliding window in tokens, or None for full attention.
    kv_lora_rank, qk_rope_head_dim: of multi-head latent attention, else None.
    dtype: the torch name of the checkpoint's dtype, e.g. "bfloat16".
    quantization: the schemes of its weights; none for a dense checkpoint, and for one that is quantized in a way this
        project does not write.
    """

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    max_position_embeddings: int
    vocab_size: int
    dtype: str
    tied_embeddings: bool
    quantization: tuple[QuantScheme, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json. Raises `SpecError` for an attention kind or family not understood."""
        family = str(config.get("model_type"))
        if family not in FAMILIES:
            raise SpecError(
                f"the KV cache of model type {family!r} is not understood (understood: {', '.join(sorted(FAMILIES))})",
                remedy=LEAVE_OUT,
            )
        if (config.get("quantization_config") or {}).get("kv_cache_scheme"):
            raise SpecError("the checkpoint's own kv_cache_scheme is not understood", remedy=LEAVE_OUT)
        num_layers = _count(config, "num_hidden_layers")
        heads = _count(config, "num_attention_heads")
        rank = rope = None
        if family in MLA_FAMILIES:
            rank, rope = _count(config, "kv_lora_rank"), _count(config, "qk_rope_head_dim")
            kv_heads, head_dim = 1, rank + rope
        else:
            kv_heads = _count(config, "num_key_value_heads", heads if family in ONE_KV_HEAD_PER_HEAD else None)
            by_division = _count(config, "hidden_size") // heads if family in DIVIDING_FAMILIES else None
            head_dim = _count(config, "head_dim", by_division)
        return cls(
            model_type=family,
            num_layers=num_layers,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            windows=_windows(config, family, num_layers),
            kv_lora_rank=rank,
            qk_rope_head_dim=rope,
            max_position_embeddings=_count(config, "max_position_embeddings"),
            vocab_size=_count(config, "vocab_size"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            tied_embeddings=bool(config.get("tie_word_embeddings", family.startswith("gemma"))),
            quantization=tuple(dict.fromkeys(scheme for _, scheme in read_groups(config) or ())),
        )

    @property
    def serving_dtype(self) -> str:
        """The dtype in which engines compute the model: a float32 checkpoint is served in bfloat16."""
        return "bfloat16" if self.dtype == "float32" else self.dtype


@dataclass(frozen=True)
class KVPlan:
    """A KV cache that fits. Sizes in bytes, lengths in tokens; `steps` is the arithmetic, line by line, for people.

    weight_bytes: of the compressed model. memory_bytes: of the accelerator. available_bytes: left to the cache.
    kv_cache_dtype: as asked for; element_dtype: what it means for this model.
    max_concurrency: how many sequences of max_model_len tokens the blocks hold at once.
    """

    bytes_per_token: int
    block_size: int
    bytes_per_block: int
    weight_bytes: int
    memory_bytes: int
    available_bytes: int
    memory_utilization: float
    num_blocks: int
    kv_tokens: int
    max_model_len: int
    max_concurrency: float
    kv_cache_dtype: str
    element_dtype: str
    steps: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**asdict(self), "steps": list(self.steps)}


def plan_kv(
    shape: ModelShape,
    *,
    weight_bytes: int,
    gpu_memory_gib: float,
    memory_utilization: float,
    activation_gib: float,
    max_model_len: int,
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
) -> KVPlan:
    """Divide an accelerator's memory into weights, activations and KV-cache blocks.

    Raises `SpecError` for a dtype or length the model cannot have, `PreflightError` if the memory is too small.
    """
    if max_model_len > shape.max_position_embeddings:
        raise SpecError(
            f"max_model_len is {max_model_len}, but the model has {shape.max_position_embeddings} positions",
            remedy=f"set max_model_len to at most {shape.max_position_embeddings}",
        )
    _check_budget(gpu_memory_gib, memory_utilization, activation_gib, max_model_len, block_size)
    bytes_per_token, token_step = _bytes_per_token(shape, kv_cache_dtype)
    bytes_per_block = bytes_per_token * block_size
    memory_bytes = int(gpu_memory_gib * GIB)
    activation_bytes = int(activation_gib * GIB)
    budget = int(memory_bytes * memory_utilization)
    available = budget - weight_bytes - activation_bytes
    if available < bytes_per_block:
        needed = (weight_bytes + activation_bytes + bytes_per_block) / memory_utilization / GIB
        raise PreflightError(
            f"the model does not fit: {_gib(weight_bytes)} weights + {_gib(activation_bytes)} activations leave no "
            f"room for a KV cache in {_gib(budget)} ({memory_utilization:g} of {_gib(memory_bytes)})",
            remedy=f"serve it on at least {needed:.2f} GiB, or compress it further",
        )
    num_blocks = available // bytes_per_block
    kv_tokens = num_blocks * block_size
    blocks_per_sequence = -(-max_model_len // block_size)
    if num_blocks < blocks_per_sequence:
        raise PreflightError(
            f"not one sequence of {max_model_len} tokens fits: it needs {_gib(blocks_per_sequence * bytes_per_block)} "
            f"of KV cache, {_gib(available)} are left",
            remedy=f"set max_model_len to at most {kv_tokens}, or give more memory or a smaller kv_cache_dtype",
        )
    concurrency = num_blocks / blocks_per_sequence
    steps = [
        token_step,
        f"{bytes_per_token} bytes per token x {block_size} tokens = {bytes_per_block} bytes per block",
        f"{memory_bytes} bytes of memory x {memory_utilization:g} = {budget} bytes for the engine",
        f"{budget} - {weight_bytes} weights - {activation_bytes} activations = {available} bytes for the KV cache",
        f"{available} // {bytes_per_block} = {num_blocks} blocks = {kv_tokens} tokens",
        f"{num_blocks} blocks / {blocks_per_sequence} blocks per {max_model_len} tokens = {concurrency:.2f} sequences",
    ]
    windowed = sum(window is not None for window in shape.windows)
    if windowed:
        steps.append(
            f"{windowed} of {shape.num_layers} layers have a sliding window and are charged in full, as engines "
            "allocate one page size for all layers: the concurrency is a lower bound"
        )
    return KVPlan(
        bytes_per_token=bytes_per_token,
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        weight_bytes=weight_bytes,
        memory_bytes=memory_bytes,
        available_bytes=available,
        memory_utilization=memory_utilization,
        num_blocks=num_blocks,
        kv_tokens=kv_tokens,
        max_model_len=max_model_len,
        max_concurrency=concurrency,
        kv_cache_dtype=kv_cache_dtype,
        element_dtype=_element_dtype(shape, kv_cache_dtype),
        steps=tuple(steps),
    )


def _check_budget(
    gpu_memory_gib: float, memory_utilization: float, activation_gib: float, max_model_len: int, block_size: int
) -> None:
    """Raise `SpecError` for a number that is no size; the comparisons are written so that NaN fails them."""
    gib = f"a number of GiB, at most {MOST_GIB}"
    for name, value, fits, wanted in (
        ("gpu_memory_gib", gpu_memory_gib, 0 < gpu_memory_gib <= MOST_GIB, gib),
        ("activation_gib", activation_gib, 0 <= activation_gib <= MOST_GIB, gib),
        ("memory_utilization", memory_utilization, 0 < memory_utilization <= 1, "a share above 0, at most 1"),
        ("max_model_len", max_model_len, max_model_len >= 1, "a positive number of tokens"),
        ("block_size", block_size, 1 <= block_size <= MOST_BLOCK_TOKENS, f"1 to {MOST_BLOCK_TOKENS} tokens"),
    ):
        if not fits:
            shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
            raise SpecError(f"{name} is {shown}, which is no such size", remedy=f"give {wanted}")


def _element_dtype(shape: ModelShape, kv_cache_dtype: str) -> str:
    return shape.serving_dtype if kv_cache_dtype == "auto" else kv_cache_dtype


def _bytes_per_token(shape: ModelShape, kv_cache_dtype: str) -> tuple[int, str]:
    """Return the bytes per token and the line of arithmetic."""
    dtype = _element_dtype(shape, kv_cache_dtype)
    if dtype not in ELEMENT_BYTES:
        close = difflib.get_close_matches(dtype, KV_CACHE_DTYPES, n=1)
        what = f"kv_cache_dtype {dtype!r}" if kv_cache_dtype != "auto" else f"dtype {dtype!r} of the checkpoint"
        remedy = (f"did you mean {close[0]!r}? " if close else "") + f"One of: {', '.join(KV_CACHE_DTYPES)}"
        raise SpecError(f"{what} is not known", remedy=remedy)
    size = ELEMENT_BYTES[dtype]
    if shape.kv_lora_rank is not None:
        factors = f"{shape.num_layers} layers x ({shape.kv_lora_rank} latent + {shape.qk_rope_head_dim} rotary)"
        total = shape.num_layers * shape.head_dim * size
    else:
        factors = f"2 (K and V) x {shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_dim}"
        total = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size
    return total, f"{factors} x {size} bytes ({dtype}) = {total} bytes per token"


def _windows(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of every layer. Raises `SpecError` for layer kinds other than full and sliding."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds is not None:
        unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != num_layers:
            what = f"layers of type {', '.join(unknown)}" if unknown else f"{len(kinds)} types for {num_layers} layers"
            raise SpecError(f"the KV cache of a model with {what} is not understood", remedy=LEAVE_OUT)
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family.startswith("qwen"):
        if config.get("use_sliding_window") and family not in ("qwen2", "qwen3"):
            raise SpecError(f"config.json of this {family} must give layer_types", remedy="complete config.json")
        first = config.get("max_window_layers") or 0
        slides = [bool(config.get("use_sliding_window")) and index >= first for index in range(num_layers)]
    elif family in {"gemma2", "gpt_oss"}:
        slides = [index % 2 == 0 for index in range(num_layers)]
    elif family == "gemma3_text":
        pattern = int(config.get("sliding_window_pattern") or 6)
        slides = [(index + 1) % pattern != 0 for index in range(num_layers)]
    else:
        slides = [window is not None] * num_layers
    if any(slides):
        width = _count(config, "sliding_window")
        return tuple(width if slide else None for slide in slides)
    return (None,) * num_layers


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer of the configuration."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNT:
        raise SpecError(
            f"config.json must give {key} as a positive integer, not {str(value)[:40]}",
            remedy="complete the model's config.json",
        )
    return value


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
