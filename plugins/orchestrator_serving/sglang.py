"""SGLang: a file for ``python -m sglang.launch_server --config serving/sglang/sglang.yaml``, its KV cache planned.

After model_executor/pool_configurator.py of SGLang 0.5.23 (Apache-2.0): a token takes the bytes of all its layers, the
pool as many tokens as fit, rounded down to whole pages. It keeps layers with a window in a pool of their own, divided
by a ratio of which it settles the use by itself; the file turns that off, so that all layers share one pool and the
plan holds. Scales of an fp8 cache come from the checkpoint, one for keys and one for values; the older JSON of
`--quantization-param-path`, which is still read, has one for both, and is not written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from orchestrator.api import KVPlan, ModelShape, ServingEngine, SpecError, Stage
from orchestrator_serving.flags import check_flags

FILE_NAME = "sglang.yaml"
LATENT_PAGE_SIZE = 64
COMPUTE_DTYPES = ("bfloat16", "float16")
_DIGITS = 10_000  # of the memory share: rounded up, as the pool is bounded by its tokens


class SGLang(ServingEngine):
    """Renders ``sglang.yaml``, to be used from the root of the release, where the model lies."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "sglang"
    paper: ClassVar = "Zheng et al. 2024, arXiv:2312.07104 (a radix tree of shared prefixes over a paged KV cache)."
    supported_versions: ClassVar = ">=0.5.21,<0.5.24"
    newest_version: ClassVar = "0.5.23"
    cache_dtypes: ClassVar = ("auto", "fp8_e4m3", "fp8_e5m2")

    kv_cache_dtype: Literal["auto", "bfloat16", "fp8_e4m3", "fp8_e5m2"] = Field(
        "auto", description="Element type of the KV cache; 'auto' is the model's, fp8 where it brings scales for it."
    )
    block_size: Literal[1, 16, 32, 64, 128] = Field(
        16, description="Tokens per page of the KV cache (page-size); models with latent attention (MLA) need 64."
    )
    max_running_requests: int = Field(
        1024, ge=1, le=2**20, description="Most sequences to run at once; the file gets fewer if fewer fit. Sequences."
    )
    prefix_caching: bool = Field(True, description="Keep and share the KV of common prompt beginnings (radix cache).")
    radix_eviction_policy: Literal["lru", "lfu", "slru", "priority", "tlru"] = Field(
        "lru", description="Which shared beginnings go first when the pool is full."
    )

    def plan(self, shape: ModelShape, weight_bytes: int) -> KVPlan:
        """Divide the memory. Raises `SpecError` first for a model that no memory would help, as `render` does."""
        self._check(shape)
        return super().plan(shape, weight_bytes)

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return ``{"sglang.yaml": text}``. Raises `SpecError` for what SGLang would refuse or silently change."""
        settings = self.settings(shape, plan)
        lines = [
            f"For SGLang {self.supported_versions}. From the root of the release, where the model lies:",
            f"    {self.command()}",
            "",
            "How the KV cache was calculated (all numbers are of one accelerator):",
            *(f"  {step}" for step in plan.steps),
            "",
            *self.notes(shape, plan),
        ]
        header = "".join(f"# {line}".rstrip() + "\n" for line in lines)
        return {FILE_NAME: header + yaml.safe_dump(settings, sort_keys=False)}

    def settings(self, shape: ModelShape, plan: KVPlan) -> dict[str, Any]:
        """The flags of ``sglang.launch_server``, without dashes. Raises `SpecError` as `render` does."""
        self._check(shape)
        pool = plan.num_blocks * plan.bytes_per_block
        settings: dict[str, Any] = {
            "model-path": ".",
            "dtype": shape.serving_dtype,
            "context-length": plan.max_model_len,
            "page-size": self.block_size,
            # Weights and pool; what is left above belongs to activations and graphs. The tokens bound the pool.
            "mem-fraction-static": math.ceil((plan.weight_bytes + pool) / plan.memory_bytes * _DIGITS) / _DIGITS,
            "max-total-tokens": plan.num_blocks * self.block_size,
            "kv-cache-dtype": self.kv_cache_dtype,
            "max-running-requests": max(1, min(self.max_running_requests, int(plan.max_concurrency))),
        }
        if plan.tensor_parallel_size > 1:
            settings["tp-size"] = plan.tensor_parallel_size
        if self.prefix_caching:
            settings["radix-eviction-policy"] = self.radix_eviction_policy
        else:
            settings["disable-radix-cache"] = True
        if any(cache.window is not None for cache in shape.attending):
            settings["disable-hybrid-swa-memory"] = True
        check_flags(self.name, self.version(), settings)
        return settings

    def command(self) -> str:
        """``sglang.launch_server`` with the file."""
        return f"python -m sglang.launch_server --config serving/{self.name}/{FILE_NAME}"

    def notes(self, shape: ModelShape, plan: KVPlan) -> Sequence[str]:
        """What to compare when SGLang starts, and where the cache's scales come from."""
        notes = [
            "SGLang takes the weights' memory as it finds it: compare its log line 'max_total_num_tokens' with "
            f"{plan.num_blocks * self.block_size}.",
        ]
        if any(cache.window is not None for cache in shape.attending):
            notes.append(
                "Layers with a sliding window or a chunk keep every token (disable-hybrid-swa-memory), and compute "
                "what they did."
            )
        if plan.element_dtype.startswith("fp8"):
            notes.append(
                "fp8 scales of keys and values come from the checkpoint (quantize: kv_scales)."
                if shape.kv_scales
                else "The checkpoint holds no fp8 KV scales: SGLang takes 1.0, which can cost accuracy. Measure it, or "
                "add `quantize: kv_scales`."
            )
        return notes

    def _check(self, shape: ModelShape) -> None:
        if shape.serving_dtype not in COMPUTE_DTYPES:
            raise SpecError(
                f"SGLang does not serve a compressed model in {shape.serving_dtype}", remedy="save it in bfloat16"
            )
        if any(cache.state is not None for cache in shape.caches):
            raise SpecError(
                "SGLang divides its memory between KV cache and recurrent states by a rule of its own, which is not "
                "planned here",
                remedy="use the vllm engine for this model, or leave sglang out of the specification",
            )
        if shape.is_latent and self.block_size != LATENT_PAGE_SIZE:
            raise SpecError(
                f"SGLang's kernels of latent attention replace a page of {self.block_size} tokens by "
                f"{LATENT_PAGE_SIZE}, and the calculation would be wrong",
                remedy=f"set block_size: {LATENT_PAGE_SIZE}",
            )
        if self.kv_cache_dtype == "bfloat16" and shape.serving_dtype != "bfloat16":
            raise SpecError(
                f"the model is served in {shape.serving_dtype}, and its KV cache would be in bfloat16",
                remedy="set kv_cache_dtype: auto",
            )
        if shape.kv_scales and self.kv_cache_dtype not in ("auto", "fp8_e4m3"):
            raise SpecError(
                f"the checkpoint brings scales for an fp8 (e4m3) cache, which do not fit {self.kv_cache_dtype}",
                remedy="set kv_cache_dtype: auto, or leave out `quantize: kv_scales`",
            )
