"""vLLM: a file for ``vllm serve --config serving/vllm/vllm.yaml``, whose KV cache has been calculated.

Keys are checked against the flags that vLLM's own parser has (schemas/), the arithmetic follows its own
(`vllm_layout`). fp8 scales come from the checkpoint, else they are 1.0: `calculate_kv_scales` is no flag any more.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from orchestrator.api import KVPlan, LayoutRule, ModelShape, ServingEngine, SpecError, Stage
from orchestrator_serving.flags import check_flags
from orchestrator_serving.vllm_layout import VLLMLayout

FILE_NAME = "vllm.yaml"
LATENT_BLOCK_SIZE = 64
# What compressed-tensors checkpoints can be computed in; vLLM refuses others.
COMPUTE_DTYPES = ("bfloat16", "float16")
# What vLLM's usual kernel for packed weights (Marlin) computes.
WEIGHT_BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
_SMALLEST_SCALED_HEAD = 32  # elements; of the kernels with a scale for each token and head
_LATENT_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")

_MOST = 2**63 - 1
FlagValue = bool | Annotated[int, Field(ge=-_MOST, le=_MOST)] | Annotated[float, Field(ge=-1e300, le=1e300)] | str
# Flags by which devices share a model: the plan is of one device, and follows tensor_parallel_size alone.
_SHARING = frozenset(
    {
        *("tensor-parallel-size", "tp", "pipeline-parallel-size", "pp", "data-parallel-size", "dp"),
        *("data-parallel-size-local", "dpl", "decode-context-parallel-size", "dcp"),
        *("prefill-context-parallel-size", "pcp", "nnodes", "n", "enable-expert-parallel"),
    }
)
# Flags that change how much memory the cache has, or how it is laid out.
_PLANNED = frozenset(
    {
        *("num-gpu-blocks-override", "kv-cache-memory-bytes", "kv-cache-layout", "kv-cache-dtype-skip-layers"),
        *("async-scheduling", "no-async-scheduling", "disable-sliding-window", "disable-hybrid-kv-cache-manager"),
        *("no-disable-hybrid-kv-cache-manager", "mamba-block-size", "mamba-cache-mode", "mamba-cache-dtype"),
        *("mamba-ssm-cache-dtype", "use-replayssm", "speculative-config", "spec-method", "spec-model", "spec-tokens"),
        *("cpu-offload-gb", "attention-config", "attention-backend", "hf-overrides", "additional-config"),
    }
)
# Flags that may make vLLM keep every layer in full, where there are layers of several kinds.
_CONNECTORS = frozenset({"kv-transfer-config", "kv-offloading-size", "kv-offloading-backend"})
# Flags whose values follow from the release.
_RELEASE = frozenset({"quantization", "q", "load-format", "model-impl", "tokenizer", "hf-config-path", "revision"})
CacheType = Literal[
    "auto",
    "float16",
    "bfloat16",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8_per_token_head",
    "fp8_per_token_head",
    "int4_per_token_head",
    "nvfp4",
    "turboquant_k8v4",
    "turboquant_4bit_nc",
    "turboquant_k3v4_nc",
    "turboquant_3bit_nc",
]


class VLLM(ServingEngine):
    """Renders ``vllm.yaml``, to be used from the root of the release, where the model lies."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "vllm"
    paper: ClassVar = "Kwon et al. 2023, arXiv:2309.06180 (paged KV cache)."
    supported_versions: ClassVar = ">=0.33,<0.34"
    newest_version: ClassVar = "0.33.0"
    cache_dtypes: ClassVar = (
        "auto",
        "fp8",
        "int8_per_token_head",
        "int4_per_token_head",
        "nvfp4",
        "turboquant_4bit_nc",
    )

    kv_cache_dtype: CacheType = Field(
        "auto", description="Element type of the KV cache; 'auto' is the model's, fp8 where it brings scales for it."
    )
    block_size: Literal[16, 32, 64, 128] = Field(
        16, description="Tokens per KV-cache block; models with latent attention (MLA) need 64."
    )
    max_num_seqs: int = Field(
        1024, ge=1, le=1024, description="Most sequences to run at once; the file gets fewer if fewer fit. Sequences."
    )
    max_num_batched_tokens: int = Field(
        8192, ge=16, le=2**20, description="Most tokens of one step; sliding windows keep twice as many. Tokens."
    )
    pin_cache: bool = Field(
        False,
        description="Give the cache exactly the planned bytes, whatever vLLM measures (kv-cache-memory-bytes).",
    )
    prefix_caching: bool = Field(True, description="Keep and share the KV blocks of common prompt beginnings.")
    extra_flags: dict[str, FlagValue] = Field(
        default_factory=dict, description="Further flags of `vllm serve`, checked against its own parser's."
    )

    def layout_rule(self) -> LayoutRule:
        """That of vLLM 0.33."""
        return VLLMLayout(self.max_num_batched_tokens, self.prefix_caching)

    def plan(self, shape: ModelShape, weight_bytes: int) -> KVPlan:
        """Divide the memory; `kv_tokens` is what vLLM logs as the size of its cache."""
        self._check(shape)
        plan = super().plan(shape, weight_bytes)
        return replace(plan, kv_tokens=int(plan.max_concurrency * plan.max_model_len))

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return ``{"vllm.yaml": text}``. Raises `SpecError` for what vLLM would refuse or silently change."""
        notes = [
            f"For vLLM {self.supported_versions}. From the root of the release, where the model lies:",
            f"    {self.command()}",
            "",
            "How the KV cache was calculated (all numbers are of one accelerator):",
            *(f"  {step}" for step in plan.steps),
            f"  {plan.whole_sequences} whole sequences of {plan.max_model_len} tokens fit beside the block that vLLM "
            f"keeps; max-num-seqs is at most {self.max_num_seqs}",
            "",
            *self.notes(shape, plan),
        ]
        header = "".join(f"# {line}".rstrip() + "\n" for note in notes for line in _wrapped(note))
        return {FILE_NAME: header + yaml.safe_dump(self.settings(shape, plan), sort_keys=False)}

    def settings(self, shape: ModelShape, plan: KVPlan) -> dict[str, Any]:
        """The flags of `vllm serve`, without dashes. Raises `SpecError` as `render` does."""
        self._check(shape)
        settings: dict[str, Any] = {
            "model": ".",
            "dtype": shape.serving_dtype,
            "max-model-len": plan.max_model_len,
            "block-size": self.block_size,
            "gpu-memory-utilization": plan.memory_utilization,
            "kv-cache-dtype": self._cache_dtype(shape),
            "max-num-seqs": max(1, min(self.max_num_seqs, plan.whole_sequences)),
            "max-num-batched-tokens": self.max_num_batched_tokens,
            "enable-prefix-caching": self.prefix_caching,
        }
        if self.pin_cache:
            settings["kv-cache-memory-bytes"] = plan.num_blocks * plan.bytes_per_block
        if plan.tensor_parallel_size > 1:
            settings["tensor-parallel-size"] = plan.tensor_parallel_size
        for name, value in self.extra_flags.items():
            flag = flag_name(name)
            head = flag.partition(".")[0]
            planned = head in _PLANNED or (head in _CONNECTORS and len(plan.groups) > 1)
            if planned or head in _RELEASE:
                what = "the cache that is planned" if planned else "what follows from the release"
                raise SpecError(
                    f"extra_flags sets {flag}, which changes {what}",
                    remedy="use pin_cache" if head == "kv-cache-memory-bytes" else "remove it from extra_flags",
                )
            if head in _SHARING:
                raise SpecError(
                    f"extra_flags sets {flag}, and the plan would be of other devices",
                    remedy="set tensor_parallel_size: it divides the model, and the plan counts with it",
                )
            if flag in settings:
                raise SpecError(
                    f"extra_flags sets {flag}, which has a parameter of its own or follows from the plan",
                    remedy="remove it from extra_flags",
                )
            settings[flag] = value
        check_flags("vllm", self.version(), settings)
        return settings

    def command(self) -> str:
        """``vllm serve`` with the file."""
        return f"vllm serve --config serving/{self.name}/{FILE_NAME}"

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What vLLM measures itself, and what not every device or kernel takes."""
        notes = [
            "vLLM measures activations and CUDA graphs when it starts. Compare its log line 'GPU KV cache size' with "
            f"{plan.kv_tokens} tokens."
        ]
        if shape.dtype != shape.serving_dtype:
            notes.append(
                f"The checkpoint is {shape.dtype}; vLLM computes, and keeps the KV cache, in {shape.serving_dtype}."
            )
        notes += _kernel_notes(shape)
        if plan.element_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2"):
            notes.append(
                "fp8 scales of keys and values come from the checkpoint (quantize: kv_scales)."
                if shape.kv_scales
                else "The checkpoint holds no fp8 KV scales: vLLM takes 1.0, which can cost accuracy. Measure it, or "
                "add `quantize: kv_scales`."
            )
        return notes

    def _check(self, shape: ModelShape) -> None:
        if shape.serving_dtype not in COMPUTE_DTYPES:
            raise SpecError(
                f"vLLM does not serve a compressed model in {shape.serving_dtype}", remedy="save it in bfloat16"
            )
        if shape.is_latent and self.block_size != LATENT_BLOCK_SIZE:
            raise SpecError(
                f"not every kernel of vLLM for latent attention takes blocks of {self.block_size} tokens; of "
                f"{LATENT_BLOCK_SIZE} all do, but CUTLASS",
                remedy=f"set block_size: {LATENT_BLOCK_SIZE}",
            )
        if shape.is_latent and self.kv_cache_dtype not in _LATENT_DTYPES:
            raise SpecError(
                f"vLLM has no kernel for latent attention with a KV cache in {self.kv_cache_dtype}",
                remedy=f"one of {', '.join(_LATENT_DTYPES)}",
            )
        if self.kv_cache_dtype.endswith("per_token_head") and shape.head_dim < _SMALLEST_SCALED_HEAD:
            raise SpecError(
                f"vLLM's kernel for {self.kv_cache_dtype} takes heads of {_SMALLEST_SCALED_HEAD} elements or more, not "
                f"{shape.head_dim}",
                remedy="set kv_cache_dtype: auto or fp8",
            )
        if shape.kv_scales and self.kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3"):
            raise SpecError(
                f"the checkpoint brings scales for an fp8 (e4m3) cache, which vLLM refuses in {self.kv_cache_dtype}",
                remedy="set kv_cache_dtype: auto, or leave out `quantize: kv_scales`",
            )

    def _cache_dtype(self, shape: ModelShape) -> str:
        """vLLM's name for the element type: it has none for a 16-bit cache other than 'auto'."""
        if self.kv_cache_dtype not in ("float16", "bfloat16"):
            return self.kv_cache_dtype
        if self.kv_cache_dtype == shape.serving_dtype:
            return "auto"
        raise SpecError(
            f"vLLM keeps the KV cache of this model in {shape.serving_dtype} or fp8, not in {self.kv_cache_dtype}",
            remedy="set kv_cache_dtype: auto",
        )


def flag_name(name: str) -> str:
    """A flag as vLLM reads it: dashes for underscores, but not after a dot, where keys of a JSON value begin."""
    flag, dot, key = name.lstrip("-").partition(".")
    return flag.replace("_", "-") + dot + key


def _wrapped(note: str) -> list[str]:
    """A comment in lines of some hundred characters; what is indented already is left alone."""
    return [note] if note.startswith(" ") or not note else textwrap.wrap(note, 110)


def _kernel_notes(shape: ModelShape) -> list[str]:
    """Say so if not every device, or only one of vLLM's kernels, takes a model like this.

    vLLM 0.33.0 loads 2 to 8 bits (compressed_tensors_wNa16.py); Marlin computes 4 and 8 in the groups above, and
    Humming, a package of its own for CUDA, takes the rest. Devices: its pages on INT8 W8A8 and FP8 W8A8.
    """
    notes = []
    for scheme in shape.quantization:
        grouped = scheme.strategy == "group"
        if scheme.format == "float-quantized":
            notes.append(
                "Weights and inputs in fp8: devices of compute capability 8.9 or more multiply them as they are; from "
                "7.5 on vLLM computes with fp8 weights and unquantized inputs."
            )
        elif scheme.input_activations is not None:
            notes.append(
                "Weights and inputs in int8: vLLM multiplies them on devices of compute capability 7.5 (Turing) to 9.x "
                "and does not run them on later ones (Blackwell). Use fp8 there."
            )
        elif scheme.num_bits not in WEIGHT_BITS or (grouped and scheme.group_size not in GROUP_SIZES):
            groups = f"groups of {scheme.group_size}" if grouped else "one group per channel"
            notes.append(
                f"Weights of {scheme.num_bits} bits in {groups}: of the kernels in vLLM 0.33 only Humming takes them "
                "(CUDA, installed beside vLLM). Every other one takes 4 or 8 bits, per channel or in groups of 32, 64 "
                "or 128."
            )
    return notes
