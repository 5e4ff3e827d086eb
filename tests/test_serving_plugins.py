"""The first-party serving plugins: the vLLM configuration file, and publishing a release."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError

import orchestrator_serving
from orchestrator.api import API_VERSION, Method, ModelShape, PreflightError, PublishError, SpecError, Stage
from orchestrator.quantized import quantization_config
from orchestrator.scheme import QuantScheme
from orchestrator.serving import GIB
from orchestrator_serving import ORCHESTRATOR_API, register_methods
from orchestrator_serving.release import Release
from orchestrator_serving.vllm import VLLM
from tests.test_serving import DEEPSEEK_V3, GPT_OSS_120B, LLAMA_8B

# Every key of the file, as a flag of `vllm serve`.
VLLM_FLAGS = {
    "model",
    "dtype",
    "max-model-len",
    "block-size",
    "gpu-memory-utilization",
    "kv-cache-dtype",
    "max-num-seqs",
    "max-num-batched-tokens",
    "enable-prefix-caching",
}


def render(engine: VLLM, config: dict[str, Any], weight_bytes: int = 5 * GIB) -> tuple[dict[str, Any], str]:
    shape = ModelShape.from_config(config)
    files = engine.render(shape, engine.plan(shape, weight_bytes))
    assert list(files) == ["vllm.yaml"]
    text = files["vllm.yaml"]
    parsed = yaml.safe_load(text)
    assert isinstance(parsed, dict)
    return parsed, text


def test_every_method_of_the_family_enters_by_the_door_of_every_plugin() -> None:
    methods = register_methods()
    assert API_VERSION in SpecifierSet(ORCHESTRATOR_API)
    written = set()
    for module in pkgutil.iter_modules(orchestrator_serving.__path__, "orchestrator_serving."):
        for cls in vars(importlib.import_module(module.name)).values():
            if isinstance(cls, type) and issubclass(cls, Method) and "name" in vars(cls):
                written.add(cls)
    assert set(methods) == {cls for cls in written if cls.__module__.startswith("orchestrator_serving.")}
    assert len({method.name for method in methods}) == len(methods)
    assert {method.stage for method in methods} == {Stage.REGISTER}
    assert {method.name for method in methods} >= {
        "release",
        "vllm",
        "kserve",
        "llm_d",
        "production_stack",
        "compose",
    }


def test_the_file_says_what_was_calculated() -> None:
    engine = VLLM(memory_utilization=0.5, max_model_len=8192)
    settings, text = render(engine, LLAMA_8B)
    assert settings == {
        "model": ".",
        "dtype": "bfloat16",
        "max-model-len": 8192,
        "block-size": 16,
        "gpu-memory-utilization": 0.5,
        "kv-cache-dtype": "auto",
        "max-num-seqs": 5,
        "max-num-batched-tokens": 8192,
        "enable-prefix-caching": True,
    }
    assert set(settings) == VLLM_FLAGS
    assert "#   2 (K and V) x 32 layers x 8 KV heads x 128 x 2 bytes (bfloat16) = 131072 bytes per token\n" in text
    assert "fp8" not in text
    assert render(engine, LLAMA_8B) == (settings, text)


def test_fp8_doubles_what_fits_and_names_its_missing_scales() -> None:
    settings, text = render(VLLM(memory_utilization=0.5, max_model_len=8192, kv_cache_dtype="fp8_e4m3"), LLAMA_8B)
    assert (settings["kv-cache-dtype"], settings["max-num-seqs"]) == ("fp8_e4m3", 11)
    assert "no fp8 KV scales" in text


def test_the_number_of_sequences_is_bounded() -> None:
    assert render(VLLM(max_model_len=16), LLAMA_8B)[0]["max-num-seqs"] == 1024
    assert render(VLLM(max_model_len=16, max_num_seqs=7), LLAMA_8B)[0]["max-num-seqs"] == 7
    assert render(VLLM(max_model_len=131072), LLAMA_8B)[0]["max-num-seqs"] == 1
    assert render(VLLM(prefix_caching=False), LLAMA_8B)[0]["enable-prefix-caching"] is False
    with pytest.raises(ValidationError):
        VLLM(max_num_seqs=1025)


def test_a_float32_checkpoint_is_served_in_bfloat16_and_the_file_says_so() -> None:
    settings, text = render(VLLM(), {**LLAMA_8B, "torch_dtype": "float32"})
    assert (settings["dtype"], settings["kv-cache-dtype"]) == ("bfloat16", "auto")
    assert "The checkpoint is float32" in text


def test_a_16_bit_cache_has_only_the_models_own_type() -> None:
    assert render(VLLM(kv_cache_dtype="bfloat16"), LLAMA_8B)[0]["kv-cache-dtype"] == "auto"
    with pytest.raises(SpecError, match="in bfloat16 or fp8, not in float16"):
        render(VLLM(kv_cache_dtype="float16"), LLAMA_8B)


def test_latent_attention_needs_the_block_that_its_kernels_use() -> None:
    with pytest.raises(SpecError, match="block_size: 64"):
        render(VLLM(), DEEPSEEK_V3)
    assert render(VLLM(block_size=64), DEEPSEEK_V3)[0]["block-size"] == 64


def packed(**scheme: Any) -> dict[str, Any]:
    return {**LLAMA_8B, "quantization_config": quantization_config({"x": QuantScheme(**scheme)}, ["lm_head"])}


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"num_bits": 3}, "Weights of 3 bits in groups of 128"),
        ({"num_bits": 2, "strategy": "channel", "group_size": None}, "Weights of 2 bits in one group per channel"),
        ({"num_bits": 4, "group_size": 16}, "Weights of 4 bits in groups of 16"),
    ],
)
def test_weights_that_need_an_uncommon_kernel_come_with_a_note(scheme: dict[str, Any], said: str) -> None:
    settings, text = render(VLLM(), packed(**scheme))
    assert said in text
    assert "Humming" in text
    assert settings == render(VLLM(), LLAMA_8B)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_with_a_kernel_are_served_as_dense_ones_are(bits: int) -> None:
    for size in (32, 64, 128):
        assert render(VLLM(), packed(num_bits=bits, group_size=size)) == render(VLLM(), LLAMA_8B)
    assert render(VLLM(), packed(num_bits=bits, strategy="channel", group_size=None)) == render(VLLM(), LLAMA_8B)


def test_a_model_with_windows_is_planned_in_the_groups_that_vllm_makes() -> None:
    settings, text = render(VLLM(gpu_memory_gib=80, max_model_len=131072), GPT_OSS_120B, 60 * GIB)
    assert "a sequence takes, of the group of 18 sliding layers, blocks for 16511 tokens at most, and 1 more" in text
    assert settings["max-num-seqs"] == 2


@pytest.mark.parametrize("wrong", [{"block_size": 17}, {"kv_cache_dtype": "fp9"}, {"calculate_kv_scales": True}])
def test_what_vllm_does_not_know_is_refused_in_the_specification(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VLLM(**wrong)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "serving").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "serving" / "vllm.yaml").write_text("model: .\n", encoding="utf-8")
    return folder


def check_publishing(method: Release, bundle: Path) -> None:
    method.preflight()
    assert method.find("tiny/1") is None
    made = method.publish(bundle, {"name": "tiny"}, "tiny/1")
    assert [file.key for file in made.files] == ["model.safetensors", "serving/vllm.yaml"]
    assert made.manifest == {"name": "tiny"}
    assert method.find("tiny/1") == made
    assert method.publish(bundle, {"name": "tiny"}, "tiny/1") == made
    (bundle / "model.safetensors").write_bytes(b"other")
    with pytest.raises(PublishError):
        method.publish(bundle, {"name": "tiny"}, "tiny/1")
    assert method.find("tiny/1") == made


def test_a_release_that_lost_a_file_is_not_found_and_publishing_mends_it(bundle: Path, tmp_path: Path) -> None:
    method = Release(uri=str(tmp_path / "releases"))
    made = method.publish(bundle, {}, "tiny/1")
    (tmp_path / "releases/tiny/1/model.safetensors").unlink()
    assert method.find("tiny/1") is None
    assert method.publish(bundle, {}, "tiny/1") == made == method.find("tiny/1")


def test_a_release_in_a_folder(bundle: Path, tmp_path: Path) -> None:
    check_publishing(Release(uri=(tmp_path / "releases").as_uri(), alias="candidate"), bundle)


def test_a_release_in_a_bucket(bundle: Path, s3_bucket: str) -> None:
    check_publishing(Release(uri=f"s3://{s3_bucket}/models"), bundle)


def test_a_store_that_cannot_be_used_is_found_before_any_compute(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(PreflightError):
        Release(uri=(tmp_path / "file" / "releases").as_uri()).preflight()
    with pytest.raises(SpecError):
        Release(uri="ftp://host/releases").preflight()


def test_the_default_place_is_the_cores_to_fill_in(bundle: Path) -> None:
    Release().preflight()
    with pytest.raises(ValueError, match="core must fill in"):
        Release().publish(bundle, {}, "tiny/1")
