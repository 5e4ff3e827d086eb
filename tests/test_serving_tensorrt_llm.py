"""TensorRT-LLM's file fits the arguments that were noted down, and what it would misread is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.api import InputScheme, ModelShape, OrchestratorError, QuantScheme, SpecError
from orchestrator.deployment import serving_files
from orchestrator.serving_engine import UnsupportedPolicyError
from orchestrator_serving import tensorrt_llm
from orchestrator_serving.tensorrt_llm import TensorRTLLM

SCHEMA = json.loads((Path(tensorrt_llm.__file__).parent / "schemas" / "tensorrt_llm-1.2.json").read_text())
LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "max_position_embeddings": 131_072, "vocab_size": 128_256, "dtype": "bfloat16",
}  # fmt: skip
FP8 = QuantScheme(
    num_bits=8, type="float", strategy="channel", group_size=None, input_activations=InputScheme(type="float")
)


def rendered(parameters: dict[str, Any], shape: ModelShape | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    engine = TensorRTLLM(**{"gpu_memory_gib": 80, "max_model_len": 8192, **parameters})
    engine.preflight()
    files = serving_files(engine, shape or ModelShape.from_config(LLAMA), 9 * 2**30)
    settings = yaml.safe_load(files["trtllm.yaml"])
    jsonschema.validate(settings, SCHEMA)
    return settings, json.loads(files["kv-plan.json"])


@pytest.mark.parametrize(
    ("parameters", "bytes_per_token"),
    [
        ({}, 131_072),
        ({"kv_cache_dtype": "fp8", "host_cache_gib": 4.5}, 65_536),
        ({"kv_cache_dtype": "nvfp4", "block_size": 64}, 32 * 8 * 2 * (64 + 8)),
        ({"policy": "window", "recent_tokens": 1000, "tensor_parallel_size": 4}, 32_768),
    ],
)
def test_the_file_holds_what_was_planned(parameters: dict[str, Any], bytes_per_token: int) -> None:
    settings, plan = rendered(parameters)
    cache = settings["kv_cache_config"]
    assert plan["bytes_per_token"] == bytes_per_token
    assert plan["bytes_per_block"] == bytes_per_token * cache["tokens_per_block"]
    assert cache["max_tokens"] == plan["num_blocks"] * cache["tokens_per_block"]
    assert plan["num_blocks"] * plan["bytes_per_block"] <= plan["available_bytes"]
    assert settings["max_batch_size"] == min(2048, int(plan["max_concurrency"]))
    assert settings["tensor_parallel_size"] == parameters.get("tensor_parallel_size", 1)
    assert cache.get("max_attention_window") == ([1000] if "policy" in parameters else None)
    assert cache.get("host_cache_size") == (4831838208 if "host_cache_gib" in parameters else None)


def test_fp8_weights_are_loaded() -> None:
    shape = ModelShape(**{**vars(ModelShape.from_config(LLAMA)), "quantization": (FP8,), "kv_scales": True})
    settings, plan = rendered({}, shape)
    assert settings["kv_cache_config"]["dtype"] == "auto" and plan["element_dtype"] == "fp8"


@pytest.mark.parametrize(
    ("parameters", "changes", "said"),
    [
        ({"policy": "streaming_llm", "recent_tokens": 64}, {}, "policy 'streaming_llm'"),
        ({}, {"quantization": (QuantScheme(num_bits=4, group_size=128),)}, "not 4-bit int weights"),
        (
            {},
            {"quantization": (FP8.model_copy(update={"type": "int", "input_activations": InputScheme()}),)},
            "not 8-bit int weights and inputs",
        ),
        ({}, {"kv_scales": True}, "only beside quantized weights"),
        ({"kv_cache_dtype": "nvfp4"}, {"quantization": (FP8,), "kv_scales": True}, "does not keep in nvfp4"),
        ({"kv_cache_dtype": "float16"}, {}, "in bfloat16, fp8 or nvfp4, not in float16"),
    ],
)
def test_what_tensorrt_llm_cannot_honour_is_refused(
    parameters: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    shape = ModelShape(**{**vars(ModelShape.from_config(LLAMA)), **changes})
    with pytest.raises(OrchestratorError) as caught:
        rendered(parameters, shape)
    assert said in str(caught.value)
    assert isinstance(caught.value, UnsupportedPolicyError) is ("policy" in parameters)


QWEN3_NEXT = {
    **LLAMA, "model_type": "qwen3_next", "head_dim": 128, "full_attention_interval": 4, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
LLAMA4 = {
    **LLAMA, "model_type": "llama4_text", "head_dim": 128, "attention_chunk_size": 8192,
    "no_rope_layers": [1, 1, 1, 0] * 8,
}  # fmt: skip


@pytest.mark.parametrize(("config", "kind"), [(QWEN3_NEXT, "state"), (LLAMA4, "chunked")])
@pytest.mark.parametrize("changes", [{}, {"gpu_memory_gib": 1.0}, {"max_model_len": 10**7}])
def test_no_memory_is_asked_for_where_none_would_help(
    config: dict[str, Any], kind: str, changes: dict[str, Any]
) -> None:
    engine = TensorRTLLM(**changes)
    with pytest.raises(SpecError, match=f"layers of kind {kind} is not known here"):
        engine.plan(ModelShape.from_config(config), 9 * 2**30)


def test_removed_and_unknown_keys_do_not_fit_the_schema() -> None:
    settings, _ = rendered({})
    for key in ("sink_token_length", "max_blocks"):
        wrong = {**settings, "kv_cache_config": {**settings["kv_cache_config"], key: 4}}
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate(wrong, SCHEMA)
