"""vLLM: a file for ``vllm serve --config serving/vllm/vllm.yaml``, whose KV cache has been calculated.

Written for vLLM 0.30 to 0.33. Only keys that all of these know are written (`calculate_kv_scales` is gone since 0.33:
fp8 scales come from the checkpoint, else they are 1.0). Sizes are stated for one accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from orchestrator.api import KVPlan, ModelShape, ServingEngine, SpecError, Stage

FILE_NAME = "vllm.yaml"
LATENT_BLOCK_SIZE = 64
# What compressed-tensors checkpoints can be computed in; vLLM refuses others.
COMPUTE_DTYPES = ("bfloat16", "float16")
# What vLLM's usual kernel for packed weights (Marlin) computes.
WEIGHT_BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


class VLLM(ServingEngine):
    """Renders ``vllm.yaml``, to be used from the root of the release, where the model lies."""

    stage: ClassVar = Stage.REGISTER
    name: ClassVar = "vllm"
    paper: ClassVar = "Kwon et al. 2023, arXiv:2309.06180 (paged KV cache)."
    supported_versions: ClassVar = ">=0.30,<0.34"

    kv_cache_dtype: Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"] = Field(
        "auto", description="Element type of the KV cache; 'auto' is the dtype the model is served in."
    )
    block_size: Literal[16, 32, 64, 128] = Field(
        16, description="Tokens per KV-cache block; models with latent attention (MLA) need 64."
    )
    max_num_seqs: int = Field(
        1024, ge=1, le=1024, description="Most sequences to run at once; the file gets fewer if fewer fit. Sequences."
    )
    prefix_caching: bool = Field(True, description="Keep and share the KV blocks of common prompt beginnings.")

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return ``{"vllm.yaml": text}``. Raises `SpecError` for what vLLM would refuse or silently change."""
        dtype = shape.serving_dtype
        if dtype not in COMPUTE_DTYPES:
            raise SpecError(f"vLLM does not serve a compressed model in {dtype}", remedy="save it in bfloat16")
        if shape.is_latent and plan.block_size != LATENT_BLOCK_SIZE:
            raise SpecError(
                f"vLLM replaces a block_size of {plan.block_size} by {LATENT_BLOCK_SIZE} for latent attention, and the "
                "calculation would be wrong",
                remedy=f"set block_size: {LATENT_BLOCK_SIZE}",
            )
        fitting = int(plan.max_concurrency)
        settings: dict[str, Any] = {
            "model": ".",
            "dtype": dtype,
            "max-model-len": plan.max_model_len,
            "block-size": plan.block_size,
            "gpu-memory-utilization": plan.memory_utilization,
            "kv-cache-dtype": _cache_dtype(dtype, plan),
            "max-num-seqs": max(1, min(self.max_num_seqs, fitting)),
            "enable-prefix-caching": self.prefix_caching,
        }
        notes = [
            f"For vLLM {self.supported_versions}. From the root of the release, where the model lies:",
            f"    vllm serve --config serving/{self.name}/{FILE_NAME}",
            "",
            "How the KV cache was calculated (one accelerator, tensor parallelism 1):",
            *(f"  {step}" for step in plan.steps),
            f"  {fitting} whole sequences of {plan.max_model_len} tokens fit; max-num-seqs is at most "
            f"{self.max_num_seqs}",
            "",
            "Assumed: weights take in memory what they take on disk, and activations and CUDA graphs what the",
            "specification leaves them (activation_gib). vLLM measures both when it starts; compare its log line",
            f"'GPU KV cache size' with {plan.kv_tokens} tokens.",
        ]
        if shape.dtype != dtype:
            notes.append(f"The checkpoint is {shape.dtype}; vLLM computes in {dtype}, and keeps the KV cache in it.")
        notes += _kernel_notes(shape)
        if plan.element_dtype.startswith("fp8"):
            notes.append("The checkpoint holds no fp8 KV scales: vLLM takes 1.0, which can cost accuracy. Measure it.")
        header = "".join(f"# {note}".rstrip() + "\n" for note in notes)
        return {FILE_NAME: header + yaml.safe_dump(settings, sort_keys=False)}


def _kernel_notes(shape: ModelShape) -> list[str]:
    """Say so if not every device, or only one of vLLM's kernels, takes a model like this.

    vLLM 0.33.0 loads 2 to 8 bits (compressed_tensors_wNa16.py); Marlin computes 4 and 8 in the groups above, and
    Humming, a package of its own for CUDA, takes the rest. Devices: its pages on INT8 W8A8 and FP8 W8A8.
    """
    notes = []
    for scheme in shape.quantization:
        grouped = scheme.strategy == "group"
        if scheme.format == "float-quantized":
            notes += [
                "Weights and inputs in fp8: devices of compute capability 8.9 or more multiply them as they are; from",
                "7.5 on vLLM computes with fp8 weights and unquantized inputs.",
            ]
        elif scheme.input_activations is not None:
            notes += [
                "Weights and inputs in int8: vLLM multiplies them on devices of compute capability 7.5 (Turing) to 9.x",
                "and does not run them on later ones (Blackwell). Use fp8 there.",
            ]
        elif scheme.num_bits not in WEIGHT_BITS or (grouped and scheme.group_size not in GROUP_SIZES):
            groups = f"groups of {scheme.group_size}" if grouped else "one group per channel"
            notes += [
                f"Weights of {scheme.num_bits} bits in {groups}: of the kernels in vLLM 0.33 only Humming takes them",
                "(CUDA, installed beside vLLM). Every other one takes 4 or 8 bits, per channel or in groups of 32, 64",
                "or 128.",
            ]
    return notes


def _cache_dtype(dtype: str, plan: KVPlan) -> str:
    """Return vLLM's name for the plan's element type: it has none for a 16-bit cache other than 'auto'."""
    if plan.element_dtype == dtype:
        return "auto"
    if plan.element_dtype.startswith("fp8"):
        return plan.element_dtype
    raise SpecError(
        f"vLLM keeps the KV cache of this model in {dtype} or fp8, not in {plan.element_dtype}",
        remedy="set kv_cache_dtype: auto",
    )
