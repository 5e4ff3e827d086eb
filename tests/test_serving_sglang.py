"""The SGLang engine: its file, its arithmetic, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from orchestrator.api import ModelShape, PreflightError, SpecError
from orchestrator.serving import GIB
from orchestrator.serving_engine import UnsupportedPolicyError
from orchestrator_serving.flags import check_flags
from orchestrator_serving.sglang import SGLang
from tests.test_serving import DEEPSEEK_V3, GPT_OSS_120B, LLAMA_8B

WEIGHTS = 5 * GIB


def render(engine: SGLang, config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    engine.preflight()
    shape = ModelShape.from_config(config)
    files = engine.render(shape, engine.plan(shape, WEIGHTS))
    assert list(files) == ["sglang.yaml"]
    settings = yaml.safe_load(files["sglang.yaml"])
    check_flags("sglang", "0.5.23", settings)
    return settings, files["sglang.yaml"]


def sglang_tokens(available: int, cell: int, page: int) -> int:
    """`DefaultPoolConfigurator.calculate_pool_sizes` of SGLang 0.5.23."""
    return available // cell // page * page


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("fp8_e4m3", 1)])
def test_the_pool_is_the_one_that_sglang_calculates(page: int, dtype: str, size: int) -> None:
    engine = SGLang(block_size=page, kv_cache_dtype=dtype, gpu_memory_gib=24, max_model_len=8192)
    settings, _ = render(engine, LLAMA_8B)
    available = int(24 * GIB * 0.92) - WEIGHTS - GIB
    cell = 8 * (128 + 128) * 32 * size
    assert settings["max-total-tokens"] == sglang_tokens(available, cell, page)
    # The memory share leaves room for exactly these tokens, within its last digit.
    share = settings["mem-fraction-static"]
    pool = settings["max-total-tokens"] * cell
    assert share >= (WEIGHTS + pool) / (24 * GIB) > share - 1.01e-4
    assert settings["max-running-requests"] == settings["max-total-tokens"] // 8192
    assert settings["page-size"] == page
    assert settings["kv-cache-dtype"] == dtype


def test_latent_attention_keeps_one_vector_whatever_the_devices() -> None:
    engine = SGLang(block_size=64, gpu_memory_gib=80, max_model_len=4096, tensor_parallel_size=8)
    settings, _ = render(engine, DEEPSEEK_V3)
    available = int(80 * GIB * 0.92) - -(-WEIGHTS // 8) - GIB
    assert settings["max-total-tokens"] == sglang_tokens(available, (512 + 64) * 61 * 2, 64)
    assert settings["tp-size"] == 8
    with pytest.raises(SpecError, match="replace a page of 16 tokens by 64"):
        render(SGLang(gpu_memory_gib=80), DEEPSEEK_V3)


def test_windows_share_the_one_pool_and_the_file_says_so() -> None:
    settings, text = render(SGLang(gpu_memory_gib=80, max_model_len=8192), GPT_OSS_120B)
    assert settings["disable-hybrid-swa-memory"] is True
    available = int(80 * GIB * 0.92) - WEIGHTS - GIB
    assert settings["max-total-tokens"] == sglang_tokens(available, 8 * (64 + 64) * 36 * 2, 16)
    assert "keep every token" in text
    assert "disable-hybrid-swa-memory" not in render(SGLang(), LLAMA_8B)[0]


def test_the_radix_cache_can_be_turned_off_and_only_off_is_a_flag() -> None:
    assert "disable-radix-cache" not in render(SGLang(radix_eviction_policy="lfu"), LLAMA_8B)[0]
    settings, _ = render(SGLang(prefix_caching=False), LLAMA_8B)
    assert settings["disable-radix-cache"] is True
    assert "radix-eviction-policy" not in settings


def test_every_supported_version_takes_the_file() -> None:
    settings, _ = render(SGLang(), LLAMA_8B)
    for version in ("0.5.21", "0.5.22", "0.5.23"):
        assert version in SpecifierSet(SGLang.supported_versions)
        check_flags("sglang", version, settings)
    assert "0.5.24" not in SpecifierSet(SGLang.supported_versions)


HYBRID = {
    **LLAMA_8B,
    "model_type": "qwen3_next",
    "head_dim": 128,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@pytest.mark.parametrize(
    ("config", "said"),
    [(HYBRID, "recurrent states"), (DEEPSEEK_V3, "replace a page of 16 tokens by 64")],
)
@pytest.mark.parametrize("changes", [{}, {"gpu_memory_gib": 1.0}, {"max_model_len": 10**7}])
def test_no_memory_is_asked_for_where_none_would_help(
    config: dict[str, Any], said: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(SpecError, match=said):
        SGLang(**changes).plan(ModelShape.from_config(config), WEIGHTS)


def test_what_sglang_would_refuse_or_change_is_refused() -> None:
    with pytest.raises(SpecError, match="would be in bfloat16"):
        render(SGLang(kv_cache_dtype="bfloat16"), {**LLAMA_8B, "torch_dtype": "float16", "dtype": "float16"})
    with pytest.raises(UnsupportedPolicyError):
        SGLang(policy="streaming_llm", recent_tokens=512).preflight()
    with pytest.raises(SpecError, match=r"outside >=0\.5\.21"):
        SGLang(engine_version="0.4.9").preflight()
    with pytest.raises(PreflightError, match="missing"):
        render(SGLang(gpu_memory_gib=8, max_model_len=32768), LLAMA_8B)
