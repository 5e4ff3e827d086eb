"""Which architectures are written as GGUF, what is said of them in the file, and where each tensor goes.

For every one the tests compare llama.cpp's logits with those of Transformers. What llama.cpp computes otherwise than
the configuration says (a window it ignores, a rope it does not know) is refused by name. Names of tensors come from
gguf-py's own tables; what they do not know is refused too, so that no tensor is left out. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.api import PreflightError

REMEDY = "leave gguf out of `formats`"
Entry = tuple[str, Any]  # a method of gguf.GGUFWriter and its argument
Arrangement = Literal["", "rotary", "by kind", "transposed", "plus one", "flat"]
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_IGNORED = re.compile(r".+\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")  # buffers that old files hold


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name. activation: the only one it computes. window: whether it knows sliding windows.

    rotary: whether queries and keys are stored in another order of rows. norms_plus_one: whether norms multiply by one
    more than is stored. biased: whether attention may have biases.
    """

    arch: str
    activation: str = "silu"
    window: bool = False
    rotary: bool = False
    norms_plus_one: bool = False
    biased: bool = False
    transposed: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", rotary=True, biased=True),
    "mistral": Family("llama", rotary=True),
    "mixtral": Family("llama", rotary=True),
    "qwen2": Family("qwen2", biased=True),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe", biased=True),
    "qwen3_moe": Family("qwen3moe"),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", window=True, norms_plus_one=True),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", window=True, norms_plus_one=True),
    "phi3": Family("phi3"),
    "gpt_neox": Family("gptneox", "gelu", biased=True),
    "gpt2": Family("gpt2", "gelu_new", biased=True, transposed=True),
}


@dataclass(frozen=True)
class Target:
    """A tensor of the file: its name, the stored tensors it is made of (experts are several), how, and its shape.

    heads: of the rows, where their order changes.
    """

    name: str
    sources: tuple[str, ...]
    arrangement: Arrangement
    heads: int
    shape: tuple[int, ...]


class Carried:
    """A configuration that can be written. Raises `PreflightError` with everything that cannot."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise PreflightError(
                f"model type {kind!r} is not written as GGUF (written: {', '.join(sorted(FAMILIES))})", remedy=REMEDY
            )
        self.kind, self.family = kind, FAMILIES[kind]
        faults = list(self._faults())
        if faults:
            raise PreflightError("; ".join(f"GGUF cannot carry {fault}" for fault in faults), remedy=REMEDY)

    def _get(self, *names: str, default: Any = None) -> Any:
        return next((self.config[name] for name in names if self.config.get(name) is not None), default)

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(self._get("num_hidden_layers", "n_layer", default=0))

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self._get("num_attention_heads", "n_head", default=1))

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values; both GPTs have one for each head, whatever their configuration says."""
        return (
            self.heads
            if self.kind in ("gpt2", "gpt_neox")
            else int(self._get("num_key_value_heads", default=self.heads))
        )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self._get("head_dim", default=int(self._get("hidden_size", "n_embd")) // self.heads))

    @property
    def experts(self) -> int:
        """Number of experts of a block; 0 for a dense model."""
        mixture = self.kind in ("mixtral", "qwen2_moe", "qwen3_moe")
        return int(self._get("num_local_experts", "num_experts", default=0)) if mixture else 0

    @property
    def positions(self) -> int:
        """How many positions the model was made for."""
        return int(self._get("max_position_embeddings", "n_positions", default=2048))

    @property
    def tied(self) -> bool:
        """Whether the embeddings are the output matrix."""
        return bool(self.config.get("tie_word_embeddings", self.kind in ("gemma2", "gemma3_text", "gpt2")))

    def _rope(self, attention: str = "full_attention") -> Mapping[str, Any]:
        found = self._get("rope_parameters", "rope_scaling", default={})
        found = found.get(attention, found)
        kind = found.get("rope_type", found.get("type", "default"))
        return {**found, "rope_type": kind, "rope_theta": found.get("rope_theta", self._get("rope_theta", default=1e4))}

    @property
    def _rotated(self) -> float:
        """The share of each head that the rope turns."""
        return float(self._rope().get("partial_rotary_factor") or self._get("partial_rotary_factor", default=1.0))

    def _faults(self) -> Iterator[str]:
        family, config = self.family, self.config
        activation = self._get("hidden_act", "hidden_activation", "activation_function", default=family.activation)
        if activation != family.activation:
            yield f"the activation {activation!r} of {self.kind}, only {family.activation!r}"
        window = self.config.get("sliding_window")
        windowed = config.get("use_sliding_window", True) if self.kind.startswith("qwen") else True
        if window and windowed and not family.window and window < self.positions:
            yield f"the sliding window of {window} tokens, which llama.cpp ignores for {self.kind}"
        if config.get("attention_bias") and not family.biased:
            yield f"biases in the attention of {self.kind}"
        known = ("default", "linear", "llama3") if family.arch == "llama" else ("default", "linear")
        if self.kind != "gpt2" and self._rope()["rope_type"] not in known:
            yield f"the rope type {self._rope()['rope_type']!r} of {self.kind}"
        if self._rotated != 1 and self.kind not in ("phi3", "gpt_neox"):
            yield f"a rope on {self._rotated:g} of each head of {self.kind}"
        if self.kind in ("gemma2", "gemma3_text"):
            yield from self._gemma_faults()
        if self.kind in ("qwen2_moe", "qwen3_moe"):
            if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
                yield "blocks without experts among those that have them"
            normed = self.kind == "qwen3_moe"
            if bool(config.get("norm_topk_prob", False)) != normed:
                yield f"norm_topk_prob: {not normed} of {self.kind}"
        if self.kind == "gpt2" and (
            config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True)
        ):
            yield "GPT-2's other scales of attention"

    def _gemma_faults(self) -> Iterator[str]:
        scalar = self._get("query_pre_attn_scalar", default=256)
        largest = self.layers == (46 if self.kind == "gemma2" else 62)
        computed = int(self._get("hidden_size")) // self.heads if largest else self.head_dim
        if scalar != computed:
            yield f"query_pre_attn_scalar: {scalar}, for which llama.cpp takes {computed}"
        if self.config.get("use_bidirectional_attention"):
            yield "bidirectional attention"
        if not self.tied:
            yield "an output matrix of its own"
        if self._period() is None:
            yield "sliding windows in these layers (layer_types); each n-th layer must be the full one"
        capped = self._get("attn_logit_softcapping"), self._get("final_logit_softcapping")
        if self.kind == "gemma3_text" and any(capped):
            yield "soft caps of Gemma 3"
        if self.kind == "gemma2" and not all(capped):
            yield "Gemma 2 without its soft caps"
        if self.kind == "gemma2" and self._rope()["rope_type"] != "default":
            yield "another rope than the default in Gemma 2"
        if self.kind == "gemma3_text" and self._rope("sliding_attention")["rope_type"] != "default":
            yield "another rope than the default in Gemma 3's windows"

    def _period(self) -> int | None:
        """Every how many layers attention is full; None if it is not so."""
        usual: int = 2
        if self.kind == "gemma3_text":
            usual = int(self._get("_sliding_window_pattern", "sliding_window_pattern", default=6))
        types = self.config.get("layer_types")
        if not types:
            return usual
        periods: tuple[int, ...] = (usual, *range(2, len(types) + 2))
        for period in periods:
            if all((kind == "full_attention") == ((at + 1) % period == 0) for at, kind in enumerate(types)):
                return period
        return None

    def entries(self) -> list[Entry]:
        """What the file says of the model, apart from its vocabulary."""
        width, inner = int(self._get("hidden_size", "n_embd")), self._get("intermediate_size", "n_inner")
        found: list[Entry] = [
            ("add_context_length", self.positions),
            ("add_embedding_length", width),
            ("add_block_count", self.layers),
            ("add_feed_forward_length", int(inner or 4 * width)),
            ("add_head_count", self.heads),
            ("add_head_count_kv", self.kv_heads),
            ("add_vocab_size", int(self._get("vocab_size"))),
        ]
        if self.kind == "gpt_neox":
            found += [("add_parallel_residual", bool(self._get("use_parallel_residual", default=True)))]
        if self.kind == "gpt2":
            return [*found, ("add_layer_norm_eps", float(self._get("layer_norm_epsilon", default=1e-5)))]
        rope = self._rope()
        found += [
            ("add_key_length", self.head_dim),
            ("add_value_length", self.head_dim),
            ("add_rope_dimension_count", int(self._rotated * self.head_dim)),
            ("add_rope_freq_base", float(rope["rope_theta"])),
        ]
        if self.kind == "gpt_neox":
            found += [("add_layer_norm_eps", float(self._get("layer_norm_eps", default=1e-5)))]
        else:
            found += [("add_layer_norm_rms_eps", float(self._get("rms_norm_eps", default=1e-6)))]
        if rope["rope_type"] == "linear":
            from gguf import RopeScalingType

            found += [("add_rope_scaling_type", RopeScalingType.LINEAR)]
            found += [("add_rope_scaling_factor", float(rope["factor"]))]
        if self.experts:
            found += [
                ("add_expert_count", self.experts),
                ("add_expert_used_count", int(self._get("num_experts_per_tok"))),
            ]
        if self.kind in ("qwen2_moe", "qwen3_moe"):
            found += [("add_expert_feed_forward_length", int(self._get("moe_intermediate_size")))]
        if self.kind == "qwen2_moe":
            found += [("add_expert_shared_feed_forward_length", int(self._get("shared_expert_intermediate_size")))]
        if self.family.window:
            found += [("add_sliding_window", int(self._get("sliding_window", default=4096)))]
            found += [("add_sliding_window_pattern", self._period())]
        if self.kind == "gemma3_text":
            found += [("add_rope_freq_base_swa", float(self._rope("sliding_attention")["rope_theta"]))]
        if self.kind == "gemma2":
            found += [("add_attn_logit_softcapping", float(self._get("attn_logit_softcapping")))]
            found += [("add_final_logit_softcapping", float(self._get("final_logit_softcapping")))]
        return found

    def rope_factors(self) -> list[float] | None:
        """By what Llama 3 divides each frequency (`_compute_llama3_parameters` of Transformers); None for others."""
        import math

        rope = self._rope()
        if self.kind == "gpt2" or rope["rope_type"] != "llama3":
            return None
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(rope["original_max_position_embeddings"])
        factors = []
        for at in range(0, self.head_dim, 2):
            length = 2 * math.pi * float(rope["rope_theta"]) ** (at / self.head_dim)
            if length < original / high:
                factors.append(1.0)
            elif length > original / low:
                factors.append(factor)
            else:
                smooth = (original / length - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        return factors

    def targets(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Target]:
        """Where every stored tensor goes, in the order of the file; shapes: by name, packed layers as ``NAME.weight``.

        Raises `PreflightError` for a tensor that has no place.
        """
        import gguf

        arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.family.arch)
        names = gguf.get_tensor_name_map(arch, self.layers)
        gathered: dict[str, list[str]] = {}
        for name in sorted(shapes, key=_natural):
            if _IGNORED.fullmatch(name) or (self.tied and name in ("lm_head.weight", "embed_out.weight")):
                continue
            match = _EXPERT.fullmatch(name)
            gathered.setdefault(f"{match[1]}.{match[3]}" if match else name, []).append(name)
        found = []
        for name, sources in gathered.items():
            place = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if place is None:
                raise PreflightError(f"GGUF has no place for {name} in a {self.kind} model", remedy=REMEDY)
            found.append(self._target(place, tuple(sources), shapes[sources[0]]))
        absent = {"token_embd.weight", *([] if self.tied else ["output.weight"])} - {target.name for target in found}
        if absent:
            raise PreflightError(f"the model has nothing for {', '.join(sorted(absent))}", remedy=REMEDY)
        return found

    def _target(self, place: str, sources: tuple[str, ...], shape: tuple[int, ...]) -> Target:
        arrangement: Arrangement = ""
        heads = 0
        if self.family.rotary and re.search(r"\.attn_[qk]\.", place):
            arrangement, heads = "rotary", self.heads if ".attn_q." in place else self.kv_heads
        elif self.kind == "gpt_neox" and ".attn_qkv." in place:
            arrangement, heads = "by kind", self.heads
        elif self.family.norms_plus_one and place.endswith("norm.weight"):
            arrangement = "plus one"
        elif self.family.transposed and re.search(r"\.(attn|ffn)_[a-z]+\.weight$", place) and len(shape) == 2:
            arrangement, shape = "transposed", (shape[1], shape[0])
        elif "ffn_gate_inp_shexp" in place:
            arrangement, shape = "flat", (shape[-1],)
        if "_exps." in place:
            shape = (len(sources), *shape)
        return Target(place, sources, arrangement, heads, shape)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def logical_shapes(stored: Mapping[str, tuple[int, ...]], packed: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, with each packed layer's parts left out; its own shape is to be filled in by who can read it."""
    parts = tuple(f"{layer}.weight_" for layer in packed)
    return {name: shape for name, shape in stored.items() if not name.startswith(parts)} if parts else dict(stored)
