"""TensorRT-LLM: a file for ``trtllm-serve --extra_llm_api_options``, with a `KvCacheConfig` of the planned size.

Names and bounds are those of tensorrt_llm/llmapi/llm_args.py, what it loads that of its
`update_quant_config_from_compressed_tensors` (Apache-2.0): dense checkpoints, and fp8 with a scale for each channel and
token. It reads 8-bit integers as fp8, and fails on weight-only ones; both are refused here. Its PyTorch backend ignores
`sink_token_length`: there is no StreamingLLM. None of this has been run: there is no TensorRT-LLM without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from orchestrator.api import KVPlan, ModelShape, ServingEngine, SpecError, Stage

FILE_NAME = "trtllm.yaml"
_LEAVE_OUT = "leave tensorrt_llm out of `engines`"


class TensorRTLLM(ServingEngine):
    """Renders ``trtllm.yaml``, to be used from the root of the release, where the model lies."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "tensorrt_llm"
    paper: ClassVar = "No paper: github.com/NVIDIA/TensorRT-LLM, KvCacheConfig."
    supported_versions: ClassVar = ">=1.2,<2"
    newest_version: ClassVar = "1.2.1"
    policies: ClassVar = frozenset({"paged", "window"})
    cache_dtypes: ClassVar = ("auto", "fp8", "nvfp4")

    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "fp8", "nvfp4"] = Field(
        "auto", description="Element type of the KV cache; 'auto' is the model's, fp8 where it brings scales for it."
    )
    block_size: Literal[16, 32, 64, 128] = Field(32, description="Tokens per KV-cache block.")
    max_num_seqs: int = Field(2048, ge=1, le=2**20, description="Most sequences to run at once. Sequences.")
    max_num_batched_tokens: int = Field(8192, ge=16, le=2**20, description="Most tokens of one step. Tokens.")
    prefix_caching: bool = Field(True, description="Keep and share the KV blocks of common prompt beginnings.")
    host_cache_gib: float = Field(0.0, ge=0, le=100_000, description="Memory of the host for blocks moved out, GiB.")

    def held_tokens(self) -> int | None:
        """A window, and the block that is being filled."""
        held = super().held_tokens()
        return None if held is None else held + self.block_size

    def plan(self, shape: ModelShape, weight_bytes: int) -> KVPlan:
        """Divide the memory. Raises `SpecError` first for a model that no memory would help, as `render` does."""
        self._check(shape)
        return super().plan(shape, weight_bytes)

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return ``{"trtllm.yaml": text}``. Raises `SpecError` for what TensorRT-LLM would refuse or misread."""
        return {FILE_NAME: yaml.safe_dump(self.settings(shape, plan), sort_keys=False)}

    def settings(self, shape: ModelShape, plan: KVPlan) -> dict[str, Any]:
        """The arguments of its `LlmArgs`. Raises `SpecError` as `render` does."""
        self._check(shape)
        cache: dict[str, Any] = {
            "dtype": self.kv_cache_dtype,
            "tokens_per_block": plan.block_size,
            "max_tokens": plan.num_blocks * plan.block_size,
            # Of what is left beside weights and activations; the tokens above decide.
            "free_gpu_memory_fraction": plan.memory_utilization,
            "enable_block_reuse": self.prefix_caching,
        }
        if self.host_cache_gib:
            cache["host_cache_size"] = int(self.host_cache_gib * 2**30)
        if self.policy == "window" and self.recent_tokens is not None:
            cache["max_attention_window"] = [self.recent_tokens]
        return {
            "dtype": shape.serving_dtype,
            "tensor_parallel_size": plan.tensor_parallel_size,
            "max_batch_size": max(1, min(self.max_num_seqs, int(plan.max_concurrency))),
            "max_num_tokens": self.max_num_batched_tokens,
            "max_seq_len": plan.max_model_len,
            "enable_chunked_prefill": True,
            "kv_cache_config": cache,
        }

    def _check(self, shape: ModelShape) -> None:
        kinds = {cache.kind for cache in shape.caches} & {"state", "chunked"}
        if kinds:
            raise SpecError(
                f"how TensorRT-LLM keeps layers of kind {'/'.join(sorted(kinds))} is not known here",
                remedy=_LEAVE_OUT,
            )
        for scheme in shape.quantization:
            inputs = scheme.input_activations
            if scheme.type != "float" or inputs is None or scheme.strategy != "channel":
                words = f"{scheme.num_bits}-bit {scheme.type} weights" + (" and inputs" if inputs else "")
                raise SpecError(
                    "of compressed-tensors checkpoints TensorRT-LLM loads fp8 with a scale for each channel and token, "
                    f"not {words}",
                    remedy=f"quantize: fp8, or {_LEAVE_OUT}",
                )
        if shape.kv_scales and not shape.quantization:
            raise SpecError(
                "TensorRT-LLM reads the scales of an fp8 cache only beside quantized weights",
                remedy="quantize: fp8 before quantize: kv_scales",
            )
        if shape.kv_scales and self.kv_cache_dtype not in ("auto", "fp8"):
            raise SpecError(
                f"the checkpoint brings scales for an fp8 cache, which TensorRT-LLM does not keep in "
                f"{self.kv_cache_dtype}",
                remedy="set kv_cache_dtype: auto",
            )
        if self.kv_cache_dtype in ("float16", "bfloat16") and self.kv_cache_dtype != shape.serving_dtype:
            raise SpecError(
                f"TensorRT-LLM keeps the KV cache of this model in {shape.serving_dtype}, fp8 or nvfp4, not in "
                f"{self.kv_cache_dtype}",
                remedy="set kv_cache_dtype: auto",
            )

    def command(self) -> str:
        """``trtllm-serve`` with the file."""
        return f"trtllm-serve . --extra_llm_api_options serving/{self.name}/{FILE_NAME}"

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What was not tried, and what is charged for windows."""
        notes = [
            "Names and bounds follow TensorRT-LLM's source; it was not run. It takes the smaller of max_tokens and "
            f"free_gpu_memory_fraction of what is free: compare its log with {plan.num_blocks} blocks."
        ]
        if any(shape.windows):
            notes.append(
                "Layers with a sliding window are charged for every token, as it does unless it is told not to."
            )
        return notes
