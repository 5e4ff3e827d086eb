"""KV-cache arithmetic against numbers that were worked out by hand or taken from an engine's log."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from orchestrator.errors import PreflightError, SpecError
from orchestrator.quantized import quantization_config
from orchestrator.scheme import QuantScheme
from orchestrator.serving import GIB, KVPlan, ModelShape, plan_kv

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_size": 3584,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "vocab_size": 129280,
    "torch_dtype": "bfloat16",
}
GPT_OSS_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_size": 2880,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "vocab_size": 201088,
    "dtype": "bfloat16",
}


def plan(config: dict[str, Any], **changes: Any) -> KVPlan:
    values: dict[str, Any] = {
        "weight_bytes": 5 * GIB,
        "gpu_memory_gib": 24.0,
        "memory_utilization": 0.5,
        "activation_gib": 1.0,
        "max_model_len": 8192,
        "kv_cache_dtype": "auto",
        "block_size": 16,
    }
    return plan_kv(ModelShape.from_config(config), **{**values, **changes})


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LLAMA_8B, 131072), (QWEN_7B, 57344), (DEEPSEEK_V3, 70272), (GPT_OSS_120B, 73728)],
    ids=["Llama-3.1-8B", "Qwen2.5-7B", "DeepSeek-V3", "gpt-oss-120b"],
)
def test_bytes_per_token_of_known_models(config: dict[str, Any], expected: int) -> None:
    assert plan(config).bytes_per_token == expected
    for dtype in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        assert plan(config, kv_cache_dtype=dtype).bytes_per_token == expected // 2
    assert plan(config, kv_cache_dtype="float32").bytes_per_token == expected * 2


def test_the_whole_division_of_memory() -> None:
    made = plan(LLAMA_8B)
    # 24 GiB x 0.5 = 12 GiB; - 5 - 1 = 6 GiB; a block is 16 x 128 KiB = 2 MiB; 6 GiB / 2 MiB = 3072
    assert (made.memory_bytes, made.available_bytes, made.bytes_per_block) == (24 * GIB, 6 * GIB, 2 * 2**20)
    assert (made.num_blocks, made.kv_tokens, made.max_concurrency) == (3072, 49152, 6.0)
    assert made.steps[0] == ("2 (K and V) x 32 layers x 8 KV heads x 128 x 2 bytes (bfloat16) = 131072 bytes per token")
    assert "6442450944 // 2097152 = 3072 blocks of 16 tokens" in made.steps
    assert json.loads(json.dumps(made.as_dict())) == made.as_dict()


def test_a_sequence_takes_whole_blocks_and_a_part_of_a_block_is_lost() -> None:
    # 33 tokens take 3 blocks of 16; one byte less than a block more is no block.
    for spare in (0, 2 * 2**20 - 1):
        made = plan(LLAMA_8B, max_model_len=33, activation_gib=0, weight_bytes=12 * GIB - 7 * 2 * 2**20 - spare)
        assert (made.num_blocks, made.max_concurrency) == (7, 7 / 3)
    assert plan(LLAMA_8B, max_model_len=32, activation_gib=0, weight_bytes=12 * GIB - 14 * 2**20).max_concurrency == 3.5


def test_a_larger_block_never_promises_more() -> None:
    by_block = [plan(QWEN_7B, block_size=size, max_model_len=1000).max_concurrency for size in (16, 32, 64, 128)]
    assert by_block == sorted(by_block, reverse=True)
    assert by_block[0] > by_block[-1]


def test_weights_that_do_not_fit_are_refused_with_the_memory_that_would_do() -> None:
    with pytest.raises(PreflightError, match=r"16\.00 GiB weights.*12\.00 GiB") as caught:
        plan(LLAMA_8B, weight_bytes=16 * GIB)
    assert "6.00 GiB are missing for one sequence of 8192 tokens" in str(caught.value)
    assert "at least 36.00 GiB" in str(caught.value)
    assert plan(LLAMA_8B, weight_bytes=16 * GIB, gpu_memory_gib=36.0).max_concurrency == 1.0


def test_a_length_that_does_not_fit_is_refused_with_the_length_that_does() -> None:
    with pytest.raises(PreflightError, match="not one sequence of 49153 tokens") as caught:
        plan(LLAMA_8B, max_model_len=49153)
    assert "at most 49152" in str(caught.value)
    assert plan(LLAMA_8B, max_model_len=49152).max_concurrency == 1.0


def test_a_length_beyond_the_positions_of_the_model_is_refused() -> None:
    with pytest.raises(SpecError, match=r"max_model_len is 32769.*32768 positions"):
        plan(QWEN_7B, max_model_len=32769)


@pytest.mark.parametrize(
    "changes",
    [
        *({"gpu_memory_gib": value} for value in (1e308, float("inf"), float("nan"), 0.0, -1.0)),
        *({"activation_gib": value} for value in (1e308, float("inf"), float("nan"), -1.0)),
        *({"memory_utilization": value} for value in (float("nan"), 0.0, 1.5, 1e308)),
        *({"block_size": value} for value in (10**400, 0, -16)),
        {"max_model_len": 0},
    ],
    ids=str,
)
def test_a_budget_that_is_no_size_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"{next(iter(changes))} is .*, which is no such size") as caught:
        plan(LLAMA_8B, **changes)
    assert caught.value.problems[0].remedy and len(str(caught.value)) < 200


def test_the_largest_and_smallest_budgets_are_calculated() -> None:
    assert plan(LLAMA_8B, gpu_memory_gib=100_000.0).num_blocks > 20_000_000
    with pytest.raises(PreflightError, match="does not fit"):
        plan(LLAMA_8B, gpu_memory_gib=1e-300, memory_utilization=1e-300)


def test_the_quantization_of_packed_weights_is_read() -> None:
    assert ModelShape.from_config(LLAMA_8B).quantization == ()
    scheme = QuantScheme(num_bits=3, group_size=64, symmetric=False)
    packed = quantization_config({"x": scheme}, ["lm_head"])
    shape = ModelShape.from_config({**LLAMA_8B, "quantization_config": packed})
    assert shape.quantization == (scheme,)
    assert len({shape, ModelShape.from_config(LLAMA_8B)}) == 2
    for other in ({"quant_method": "gptq", "bits": 4}, {**packed, "format": "dense"}, {**packed, "config_groups": {}}):
        assert ModelShape.from_config({**LLAMA_8B, "quantization_config": other}).quantization == ()


def test_an_unknown_cache_dtype_is_refused_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match="did you mean 'fp8_e4m3'"):
        plan(LLAMA_8B, kv_cache_dtype="fp8_e4m")
    with pytest.raises(SpecError, match="dtype 'int3' of the checkpoint"):
        plan({**LLAMA_8B, "torch_dtype": "int3"})


def test_windows_are_recorded_but_charged_in_full() -> None:
    shape = ModelShape.from_config(GPT_OSS_120B)
    assert shape.windows == (128, None) * 18
    assert any("lower bound" in step for step in plan(GPT_OSS_120B).steps)
    assert ModelShape.from_config(QWEN_7B).windows == (None,) * 28
    mistral = {**LLAMA_8B, "model_type": "mistral", "sliding_window": 4096}
    assert ModelShape.from_config(mistral).windows == (4096,) * 32
    gemma2 = {**GPT_OSS_120B, "model_type": "gemma2", "layer_types": None, "sliding_window": 4096}
    assert ModelShape.from_config(gemma2).windows == (4096, None) * 18
    gemma3 = {**gemma2, "model_type": "gemma3_text", "num_hidden_layers": 7}
    assert ModelShape.from_config(gemma3).windows == (4096,) * 5 + (None, 4096)
    partly = {**QWEN_7B, "use_sliding_window": True, "max_window_layers": 20}
    assert ModelShape.from_config(partly).windows == (None,) * 20 + (131072,) * 8


def test_geometry_follows_the_defaults_of_transformers() -> None:
    plain = {key: value for key, value in LLAMA_8B.items() if key != "num_key_value_heads"}
    assert ModelShape.from_config(plain).num_kv_heads == 32
    assert ModelShape.from_config({**LLAMA_8B, "head_dim": 64}).head_dim == 64
    assert ModelShape.from_config({**LLAMA_8B, "head_dim": None}).head_dim == 128
    assert ModelShape.from_config({**LLAMA_8B, "dtype": "float16"}).dtype == "float16"
    assert ModelShape.from_config(LLAMA_8B).tied_embeddings is False


def test_a_float32_checkpoint_is_planned_as_engines_serve_it() -> None:
    config = {**LLAMA_8B, "torch_dtype": "float32"}
    assert ModelShape.from_config(config).dtype == "float32"
    assert plan(config).bytes_per_token == 131072
    assert plan(config).element_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba2"}, "'mamba2' is not understood"),
        ({"model_type": "qwen3_next", "head_dim": 256}, "linear_num_key_heads"),
        ({"layer_types": ["linear_attention"] * 32}, "layers of type linear_attention"),
        ({"layer_types": ["full_attention"] * 31}, "31 types for 32 layers"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads"),
        ({"model_type": "qwen3"}, "head_dim"),
        ({"model_type": "deepseek_v3"}, "kv_lora_rank"),
        ({"model_type": "qwen3_moe", "head_dim": 128, "use_sliding_window": True}, "layer_types"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        ModelShape.from_config({**LLAMA_8B, **changes})


def test_the_geometry_agrees_with_the_cache_of_transformers() -> None:
    """One forward pass of real (random) models: the elements Transformers caches are the elements counted here."""
    import torch
    from transformers import Gemma2Config, LlamaConfig, Qwen3Config
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    size: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "dtype": "bfloat16",
    }
    for config in (LlamaConfig(**size), Qwen3Config(**size), Gemma2Config(**size, sliding_window=32)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
        used = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        saved = json.loads(model.config.to_json_string())
        assert plan(saved, max_model_len=64).bytes_per_token * 5 == used, config.model_type


def test_the_module_imports_no_torch() -> None:
    code = "import sys, orchestrator.serving; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
