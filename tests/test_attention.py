"""What is read from config.json, against the caches that Transformers fills for real (random, tiny) models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.attention import FAMILIES, MLA_FAMILIES, ModelShape
from orchestrator.errors import SpecError
from tests.test_serving import GPT_OSS_120B, LLAMA_8B

LENGTH = 5
SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
# What differs from SIZE. Those that are not here differ in nothing.
EXTRA: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 4},
    "gpt_bigcode": {"n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"multi_query": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "qwen2_moe": EXPERTS,
    "mixtral": {**EXPERTS, "sliding_window": 3},
    "mistral": {"sliding_window": 3},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 3},
    "gemma3_text": {"head_dim": 16, "sliding_window": 3},
    "gpt_oss": {**EXPERTS, "head_dim": 16, "sliding_window": 3},
    "cohere2": {"sliding_window": 3},
    "olmo3": {"sliding_window": 3},
    "exaone4": {"sliding_window": 3},
    "glm": {"head_dim": 16, "pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "nemotron": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "stablelm": {"num_key_value_heads": 4},
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **MAMBA2,
        **EXPERTS,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 16,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "qwen3_next": {**EXPERTS, **DELTA},
    "qwen3_5_text": DELTA,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
COVERED = sorted({*EXTRA, "llama", "olmo2", "granite", "starcoder2", "gpt_neox", "phi", "cohere", "helium"})


@pytest.mark.parametrize("family", COVERED)
def test_the_elements_that_transformers_caches_are_those_that_are_counted(family: str) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    own = {"head_dim": 8} if family == "helium" else {}
    made = AutoConfig.for_model(family, **{**SIZE, **EXTRA.get(family, {}), **own})
    model = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, LENGTH, dtype=torch.long), use_cache=True).past_key_values
    shape = ModelShape.from_config(json.loads(model.config.to_json_string()))
    assert shape.num_layers == len(cache.layers) == SIZE["num_hidden_layers"]
    for index, layer in enumerate(cache.layers):
        kept = [entry for entry in shape.caches if entry.layer == index]
        growing = [entry for entry in kept if entry.kind != "state"]
        keys = getattr(layer, "keys", None)
        assert len(growing) == (keys is not None)
        if keys is not None:
            assert keys.numel() == kept_tokens(growing[0].window) * growing[0].num_kv_heads * growing[0].head_dim
            assert (
                layer.values.numel() == kept_tokens(growing[0].window) * growing[0].num_kv_heads * growing[0].head_dim_v
            )
        states = [entry.state for entry in kept if entry.state is not None]
        assert len(states) == ("Linear" in type(layer).__name__)
        for state in states:
            assert state is not None
            convolution = layer.conv_states[0]
            assert convolution.numel() // convolution.shape[-1] * state.taps == state.convolution()
            recurrent = layer.recurrent_states[0]
            assert (0 if recurrent is None else recurrent.numel()) == state.recurrent


def kept_tokens(window: int | None) -> int:
    """Tokens that Transformers keeps: a window of w keeps the w - 1 before the next token."""
    return LENGTH if window is None else min(LENGTH, window - 1)


def test_the_window_of_every_layer_is_read() -> None:
    assert ModelShape.from_config(GPT_OSS_120B).windows == (128, None) * 18
    llama4 = {**LLAMA_8B, "model_type": "llama4_text", "head_dim": 128, "attention_chunk_size": 8192}
    shape = ModelShape.from_config(
        {**llama4, "layer_types": ["chunked_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4}
    )
    assert [cache.kind for cache in shape.caches] == ["chunked"] * 3 + ["full"]
    assert shape.windows == (8192,) * 3 + (None,)
    with pytest.raises(SpecError, match="must give no_rope_layers"):
        ModelShape.from_config(llama4)


def test_a_model_that_sees_images_is_planned_by_its_text_part() -> None:
    text = {key: value for key, value in LLAMA_8B.items() if key != "torch_dtype"}
    shape = ModelShape.from_config({"model_type": "llava", "text_config": text, "torch_dtype": "float16"})
    assert (shape.model_type, shape.num_layers, shape.dtype) == ("llama", 32, "float16")
    with pytest.raises(SpecError, match="'llava' is not understood"):
        ModelShape.from_config({"model_type": "llava"})


def test_the_state_of_a_gated_delta_net_is_that_of_the_published_measurement() -> None:
    """598.5 MiB for four sequences in float32, as LM Studio shows for Qwen3.6-27B (lmstudio-bug-tracker #1862)."""
    config = {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": 5120,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "vocab_size": 248320,
        "dtype": "bfloat16",
    }
    shape = ModelShape.from_config(config)
    assert len(shape.attending) == 16
    states = [cache.state for cache in shape.caches if cache.state is not None]
    assert round(4 * 4 * sum(state.elements() for state in states) / 2**20, 1) == 598.5


def test_groups_that_several_devices_need_are_on_all_of_them() -> None:
    """vLLM's extra_groups_for_head_shards: with 8 groups on 16 devices every device keeps one."""
    state = {"mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4}
    config = {**LLAMA_8B, **state, "model_type": "nemotron_h", "head_dim": 128, "hybrid_override_pattern": "M-*E"}
    shape = ModelShape.from_config({**config, "num_hidden_layers": 4})
    assert [(cache.layer, cache.kind) for cache in shape.caches] == [(0, "state"), (2, "full")]
    kept = shape.caches[0].state
    assert kept is not None
    assert kept.convolution(1) == (128 * 64 + 2 * 8 * 128) * 3
    assert kept.convolution(8) == (128 * 64 + 2 * 8 * 128) // 8 * 3
    assert kept.convolution(16) == (128 * 64 + 2 * 16 * 128) // 16 * 3
    assert kept.elements(16) == kept.convolution(16) + 128 * 64 * 128 // 16


def test_every_family_is_refused_without_its_numbers_and_never_by_a_fault() -> None:
    for family in sorted(FAMILIES):
        with pytest.raises(SpecError, match=r"config\.json"):
            ModelShape.from_config({"model_type": family})


def test_latent_attention_keeps_one_vector() -> None:
    for family in sorted(MLA_FAMILIES):
        shape = ModelShape.from_config({**LLAMA_8B, "model_type": family, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
        assert shape.is_latent
        assert {cache.elements_per_token for cache in shape.caches} == {576}


def test_scales_of_the_checkpoint_are_seen() -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert ModelShape.from_config({**LLAMA_8B, "quantization_config": {"kv_cache_scheme": scheme}}).kv_scales
    assert ModelShape.from_config({**LLAMA_8B, "compression_config": {"kv_cache_scheme": scheme}}).kv_scales
    assert not ModelShape.from_config(LLAMA_8B).kv_scales
    for other in ({"num_bits": 4}, {"dynamic": True}, {"strategy": "channel"}, {"type": "int"}):
        with pytest.raises(SpecError, match="kv_cache_scheme"):
            ModelShape.from_config({**LLAMA_8B, "quantization_config": {"kv_cache_scheme": {**scheme, **other}}})
