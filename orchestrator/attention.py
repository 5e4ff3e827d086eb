"""What a model keeps of past tokens, layer by layer, as its config.json tells.

A layer keeps one of

    full, sliding, chunked   keys and values of each KV head (MHA, GQA, MQA), of all tokens, of the last `window`, or
                             of the current chunk of `window` tokens
    latent                   one latent vector and one rotary key for all heads (MLA)
    state                    a recurrent state of fixed size (Mamba, Gated DeltaNet, short convolutions)

or nothing: a layer that reads the cache of another, or has no attention. Engines decide what of that they can use;
their rules are in the serving plugins. What is not understood is refused: a wrong number here is an out-of-memory error
in production. No torch, no Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config_entries import count, layer_index
from orchestrator.errors import SpecError
from orchestrator.kv_scales import DENSE_ENTRY, KV_CACHE_SCHEME
from orchestrator.quantized import read_groups
from orchestrator.recurrent import STATES, RecurrentState
from orchestrator.scheme import QuantScheme

MOST_LAYERS = 10_000
LEAVE_OUT = "leave the serving configuration out of the specification"
AttentionKind = Literal["full", "sliding", "chunked", "latent", "state"]
_KINDS: Mapping[str, AttentionKind | None] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "mlp": None,
    "moe": None,
}
# What Transformers takes a missing key for. `num_key_value_heads`: one KV head for each attention head;
ONE_KV_HEAD_PER_HEAD = frozenset(
    {
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "gpt2",
        "gpt_neox",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "hunyuan_v1_dense",
        "llama",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "phi",
        "phi3",
    }
)
# `head_dim`: hidden_size / num_attention_heads;
DIVIDING_FAMILIES = ONE_KV_HEAD_PER_HEAD | {
    "bamba",
    "exaone4",
    "falcon",
    "falcon_h1",
    "gpt_bigcode",
    "jamba",
    "lfm2",
    "ministral",
    "mistral",
    "mixtral",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
}
# neither: the configuration must say.
STATING_FAMILIES = frozenset(
    {
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_oss",
        "helium",
        "llama4_text",
        "minimax_m2",
        "ministral3",
        "nemotron",
        "nemotron_h",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "seed_oss",
    }
)
MLA_FAMILIES = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite"})
_PLAIN = frozenset({"gpt2", "gpt_neox", "opt"})  # one KV head for each attention head, whatever the file says
FAMILIES = DIVIDING_FAMILIES | STATING_FAMILIES | MLA_FAMILIES


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps.

    layer: of which decoder layer; one with attention and a state beside it has two entries.
    num_kv_heads, head_dim, head_dim_v: heads, and elements of a key and of a value; latent attention has one head of
        kv_lora_rank + qk_rope_head_dim elements, and no values.
    window: tokens of a sliding window, or of a chunk.
    """

    kind: AttentionKind
    layer: int
    num_kv_heads: int = 0
    head_dim: int = 0
    head_dim_v: int = 0
    window: int | None = None
    state: RecurrentState | None = None

    @property
    def elements_per_token(self) -> int:
        """Elements kept of each token; 0 for a state."""
        return self.num_kv_heads * (self.head_dim + self.head_dim_v)


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a model's KV cache.

    num_layers: decoder layers. caches: what they keep, in their order.
    dtype: the torch name of the checkpoint's dtype, e.g. "bfloat16".
    quantization: the schemes of its weights; none for a dense checkpoint, and for one that is quantized in a way this
        project does not write.
    kv_scales: whether the checkpoint brings scales for an fp8 cache (`quantize: kv_scales`).
    """

    model_type: str
    num_layers: int
    num_attention_heads: int
    caches: tuple[LayerCache, ...]
    max_position_embeddings: int
    vocab_size: int
    dtype: str
    tied_embeddings: bool
    quantization: tuple[QuantScheme, ...] = ()
    kv_scales: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face config.json. Raises `SpecError` for an attention kind or family not understood."""
        text = config.get("text_config")
        whole, family = config, str(config.get("model_type"))
        if family not in FAMILIES and isinstance(text, Mapping):  # of a model that sees images too
            kept = {key: config[key] for key in ("quantization_config", DENSE_ENTRY) if key in config}
            config, family = {**text, **kept}, str(text.get("model_type"))
        if family not in FAMILIES:
            raise SpecError(
                f"the KV cache of model type {family!r} is not understood (understood: {', '.join(sorted(FAMILIES))})",
                remedy=LEAVE_OUT,
            )
        num_layers, kv_scales = _num_layers(config, family), _brings_scales(config)
        dtypes = (entry.get(name) for entry in (config, whole) for name in ("dtype", "torch_dtype"))
        return cls(
            model_type=family,
            num_layers=num_layers,
            num_attention_heads=count(config, "num_attention_heads"),
            caches=_caches(config, family, num_layers),
            max_position_embeddings=count(config, "max_position_embeddings"),
            vocab_size=count(config, "vocab_size"),
            dtype=str(next((dtype for dtype in dtypes if dtype), "float32")),
            tied_embeddings=bool(config.get("tie_word_embeddings", family.startswith("gemma"))),
            quantization=tuple(dict.fromkeys(scheme for _, scheme in read_groups(config) or ())),
            kv_scales=kv_scales,
        )

    @property
    def serving_dtype(self) -> str:
        """The dtype in which engines compute the model: a float32 checkpoint is served in bfloat16."""
        return "bfloat16" if self.dtype == "float32" else self.dtype

    @property
    def attending(self) -> tuple[LayerCache, ...]:
        """The caches that grow with the sequence."""
        return tuple(cache for cache in self.caches if cache.kind != "state")

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent."""
        return any(cache.kind == "latent" for cache in self.caches)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """By attending layer the sliding window or chunk in tokens, or None for full attention."""
        return tuple(cache.window for cache in self.attending)

    @property
    def num_kv_heads(self) -> int:
        """Largest number of KV heads of a layer; 1 for latent attention."""
        return max((cache.num_kv_heads for cache in self.caches), default=0)

    @property
    def head_dim(self) -> int:
        """Largest number of elements of a key."""
        return max((cache.head_dim for cache in self.caches), default=0)


def _brings_scales(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint says how its KV cache is quantized. Raises `SpecError` if not by fp8 scales of tensors."""
    entry = config.get("quantization_config") or config.get(DENSE_ENTRY) or {}
    if not isinstance(entry, Mapping):
        raise SpecError("config.json must give quantization_config as a mapping", remedy="copy the model again")
    scheme = entry.get("kv_cache_scheme")
    if not scheme:
        return False
    if not isinstance(scheme, Mapping) or any(scheme.get(key) != value for key, value in KV_CACHE_SCHEME.items()):
        raise SpecError("the checkpoint's own kv_cache_scheme is not understood", remedy=LEAVE_OUT)
    return True


def _num_layers(config: Mapping[str, Any], family: str) -> int:
    if family == "nemotron_h" and config.get("num_hidden_layers") is None:
        pattern = config.get("hybrid_override_pattern") or config.get("layers_block_type") or ()
        return len(pattern) or count(config, "num_hidden_layers")
    layers = count(config, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise SpecError(f"config.json gives {layers} layers, which no model has", remedy="copy the model again")
    return layers


def _caches(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[LayerCache, ...]:
    kinds = _kinds(config, family, num_layers)
    if family in MLA_FAMILIES:
        latent = count(config, "kv_lora_rank") + count(config, "qk_rope_head_dim")
        return tuple(LayerCache("latent", layer, 1, latent) for layer in range(num_layers))
    heads = count(config, "num_attention_heads")
    kv_heads = _kv_heads(config, family, heads)
    by_division = None
    if family in DIVIDING_FAMILIES and (family in _PLAIN or config.get("head_dim") is None):
        by_division, rest = divmod(count(config, "hidden_size"), heads)
        if rest:
            raise SpecError(
                f"config.json gives {heads} attention heads, which do not divide hidden_size {config['hidden_size']}",
                remedy="copy the model again, config.json and weights together",
            )
    if heads % kv_heads:
        raise SpecError(
            f"config.json gives {kv_heads} KV heads, which do not divide {heads} attention heads",
            remedy="copy the model again, config.json and weights together",
        )
    if family in _PLAIN or family in ("gpt_bigcode", "falcon"):  # a head_dim there would mean nothing
        head_dim = by_division or 0
    else:
        head_dim = count(config, "head_dim", by_division)
    caches: list[LayerCache] = []
    for layer, kind in enumerate(kinds):
        if kind in ("full", "hybrid"):
            caches.append(LayerCache("full", layer, kv_heads, head_dim, head_dim))
        elif kind in ("sliding", "chunked"):
            width = count(config, "sliding_window" if kind == "sliding" else "attention_chunk_size")
            caches.append(LayerCache(kind, layer, kv_heads, head_dim, head_dim, width))
        if kind in ("state", "hybrid"):
            caches.append(LayerCache("state", layer, state=STATES[family](config)))
    return tuple(caches)


def _kv_heads(config: Mapping[str, Any], family: str, heads: int) -> int:
    if family in _PLAIN:
        return heads
    if family == "gpt_bigcode":
        return 1 if config.get("multi_query", True) else heads
    if family == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    return count(config, "num_key_value_heads", heads if family in ONE_KV_HEAD_PER_HEAD else None)


def _kinds(config: Mapping[str, Any], family: str, num_layers: int) -> list[AttentionKind | Literal["hybrid"] | None]:
    """What every decoder layer keeps. Raises `SpecError` for kinds that are not understood."""
    if family == "falcon_h1":
        return ["hybrid"] * num_layers
    named = config.get("layer_types") or config.get("layers_block_type")
    if family == "nemotron_h" and config.get("hybrid_override_pattern"):
        letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        named = [letters.get(letter, letter) for letter in str(config["hybrid_override_pattern"])]
    if named is not None and not isinstance(named, list):
        raise SpecError("config.json must give the types of layers as a list", remedy="complete config.json")
    if named is not None:
        unknown = sorted({str(kind) for kind in named} - _KINDS.keys())
        states = any(_KINDS.get(str(kind)) == "state" for kind in named)
        if states and family not in STATES:
            unknown = sorted({str(kind) for kind in named if _KINDS.get(str(kind)) == "state"})
        if unknown or len(named) != num_layers:
            what = f"layers of type {', '.join(unknown)}" if unknown else f"{len(named)} types for {num_layers} layers"
            raise SpecError(f"the KV cache of a model with {what} is not understood", remedy=LEAVE_OUT)
        return [_KINDS[str(kind)] for kind in named]
    if family in _UNNAMED:
        return _UNNAMED[family](config, num_layers)
    if family in ("cohere2", "granitemoehybrid", "lfm2", "nemotron_h", "olmo3", "exaone4"):
        raise SpecError(f"config.json of this {family} must give layer_types", remedy="complete config.json")
    windowed = config.get("sliding_window") is not None and family in _WINDOWED
    return ["sliding" if windowed else "full"] * num_layers


# Families whose every layer has the window that config.json names, if it names one.
_WINDOWED = frozenset({"ministral", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2"})


def _every(period: int, offset: int, one: AttentionKind, other: AttentionKind, num_layers: int) -> list[Any]:
    return [one if index % period == offset else other for index in range(num_layers)]


def _qwen(config: Mapping[str, Any], num_layers: int) -> list[Any]:
    if config.get("use_sliding_window") and config["model_type"] not in ("qwen2", "qwen3"):
        raise SpecError(
            f"config.json of this {config['model_type']} must give layer_types", remedy="complete config.json"
        )
    first = layer_index(config, "max_window_layers")
    return ["sliding" if config.get("use_sliding_window") and i >= first else "full" for i in range(num_layers)]


def _gemma3(config: Mapping[str, Any], num_layers: int) -> list[Any]:
    period = count(config, "sliding_window_pattern", 6)
    return _every(period, period - 1, "full", "sliding", num_layers)


def _llama4(config: Mapping[str, Any], num_layers: int) -> list[Any]:
    """Layers without rotary positions (marked 0) attend to everything, the others to their chunk."""
    marks = config.get("no_rope_layers")
    if not isinstance(marks, list) or len(marks) != num_layers:
        raise SpecError("config.json of this llama4_text must give no_rope_layers", remedy="complete config.json")
    return ["chunked" if mark else "full" for mark in marks]


def _gated_delta(config: Mapping[str, Any], num_layers: int) -> list[Any]:
    period = count(config, "full_attention_interval", 4)
    return _every(period, period - 1, "full", "state", num_layers)


def _bamba(config: Mapping[str, Any], num_layers: int) -> list[Any]:
    attending = config.get("attn_layer_indices") or []
    if not isinstance(attending, list):
        raise SpecError("config.json must give attn_layer_indices as a list", remedy="complete config.json")
    return ["full" if index in attending else "state" for index in range(num_layers)]


def _jamba(config: Mapping[str, Any], num_layers: int) -> list[Any]:
    period, offset = count(config, "attn_layer_period"), layer_index(config, "attn_layer_offset")
    return _every(period, offset, "full", "state", num_layers)


# What config.json leaves to the model's code where it gives no layer_types.
_UNNAMED: Mapping[str, Callable[[Mapping[str, Any], int], list[Any]]] = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _qwen),
    **dict.fromkeys(("gemma2", "gpt_oss"), lambda config, num_layers: _every(2, 1, "full", "sliding", num_layers)),
    "gemma3_text": _gemma3,
    "llama4_text": _llama4,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _gated_delta),
    "bamba": _bamba,
    "jamba": _jamba,
}
