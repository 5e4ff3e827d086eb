"""The vLLM planner against what vLLM 0.33's own functions returned (benchmarks/engines/record_vllm_kv.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import ModelShape, PreflightError
from orchestrator.cache_dtypes import cache_dtype
from orchestrator.serving import GIB, plan_kv
from orchestrator_serving.vllm_layout import VLLMLayout
from tests.test_serving import GPT_OSS_120B

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vllm_0_33_kv.json").read_text(encoding="utf-8"))
KINDS = {
    "full_attention": "full",
    "sliding_window": "sliding",
    "mla_attention": "latent",
    "mamba": "state",
    "chunked_local_attention": "chunked",
}


def planned_here(case: dict[str, Any]) -> bool:
    """Not: packed latent caches (vLLM refuses them for every model here), and switches that the files leave alone."""
    return bool(
        case["kv_cache_dtype"] not in ("fp8_ds_mla", "nvfp4_ds_mla")
        and case["async_scheduling"]
        and not case["disable_hybrid_kv_cache_manager"]
        and (case["chunked_local_with_hybrid"] or not case["name"].startswith("Llama-4"))  # its default
        and case["name"] != "DeepSeek-V3.2"  # whose indexer has a cache of its own
    )


CASES = [case for case in GOLDEN["cases"] if planned_here(case) and "refused" not in case]
REFUSED = [case for case in GOLDEN["cases"] if planned_here(case) and "max seq len" in case.get("refused", "")]


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{case['name']}" for n, case in enumerate(CASES)])
def test_blocks_groups_and_concurrency_are_those_of_the_engine(case: dict[str, Any]) -> None:
    shape = ModelShape.from_config(GOLDEN["models"][case["name"]])
    rule = VLLMLayout(case["max_num_batched_tokens"], case["enable_prefix_caching"])
    name = case["kv_cache_dtype"]
    dtype = cache_dtype(shape.serving_dtype if name == "auto" else name)
    devices, length = case["tensor_parallel_size"], case["max_model_len"]
    hybrid = any(cache.state is not None for cache in shape.caches)
    block_size = case["block_size"] or (16 if hybrid else case["effective_block_size"])
    layout = rule(shape, dtype, block_size, devices, length)
    assert layout.bytes_per_block == case["bytes_per_block"]
    made = [(group.kind, group.layers, group.blocks_for(length)) for group in layout.groups]
    wanted = [(KINDS[group["kind"]], group["layers"], group["blocks_per_sequence"]) for group in case["groups"]]
    assert sorted(made) == sorted(wanted)
    sizes = {group["block_size"] for group in case["groups"] if group["kind"] != "mamba"}
    assert sizes == {group.block_size for group in layout.groups}
    blocks = case["available_bytes"] // layout.bytes_per_block
    assert blocks == case["num_blocks"]
    concurrency = blocks / sum(group.blocks_for(length) for group in layout.groups)
    assert concurrency == case["max_concurrency"]
    assert int(concurrency * length) == case["kv_cache_tokens"]


@pytest.mark.parametrize("case", REFUSED, ids=[f"{n}-{case['name']}" for n, case in enumerate(REFUSED)])
def test_what_does_not_fit_is_refused_with_the_length_that_the_engine_would_name(case: dict[str, Any]) -> None:
    shape = ModelShape.from_config(GOLDEN["models"][case["name"]])
    named = re.search(r"estimated maximum model length is (\d+)", case["refused"])
    assert named is not None
    with pytest.raises(PreflightError, match=f"at most {named[1]},"):
        plan_kv(
            shape,
            weight_bytes=0,
            gpu_memory_gib=case["available_bytes"] / GIB,
            memory_utilization=1.0,
            activation_gib=0.0,
            max_model_len=case["max_model_len"],
            layout_rule=VLLMLayout(case["max_num_batched_tokens"], case["enable_prefix_caching"]),
        )


def test_the_published_log_line_of_gpt_oss() -> None:
    """5.38 GiB of cache are 78,384 tokens by 73,728 bytes (hf-mem #60): two groups of 18 layers share the pages."""
    plan = plan_kv(
        ModelShape.from_config(GPT_OSS_120B),
        weight_bytes=0,
        gpu_memory_gib=5.3829,
        memory_utilization=1.0,
        activation_gib=0.0,
        max_model_len=8192,
        layout_rule=VLLMLayout(8192),
    )
    assert plan.bytes_per_token == 73728
    assert plan.bytes_per_block == 73728 // 2 * 16
    assert abs(plan.num_blocks // 2 * 16 - 78384) <= 16
