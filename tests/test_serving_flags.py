"""Settings against the flags that the engines' own parsers have."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator_serving.flags import NEWEST, check_flags

VLLM = {
    "model": ".",
    "dtype": "bfloat16",
    "max-model-len": 4096,
    "block-size": 16,
    "gpu-memory-utilization": 0.9,
    "kv-cache-dtype": "fp8",
    "enable-prefix-caching": False,
    "kv-cache-dtype-skip-layers": ["0", "1"],
    "speculative-config": {"method": "ngram"},
    "kv-transfer-config.kv_role": "kv_both",
}
SGLANG = {"model-path": ".", "context-length": 4096, "page-size": 1, "mem-fraction-static": 0.8, "tp-size": 2}


@pytest.mark.parametrize(("engine", "settings"), [("vllm", VLLM), ("sglang", SGLANG)])
def test_settings_as_we_write_them_pass(engine: str, settings: dict[str, Any]) -> None:
    check_flags(engine, NEWEST[engine], settings)
    check_flags(engine, NEWEST[engine], {name.replace("-", "_"): value for name, value in settings.items()})
    with pytest.raises(SpecError, match="has no flag"):
        check_flags(engine, NEWEST[engine], {**settings, "no-such-flag": 1})


@pytest.mark.parametrize(
    ("engine", "version", "settings", "message", "remedy"),
    [
        ("vllm", "0.33.0", {"block_sise": 16}, "no flag --block_sise", "did you mean block-size"),
        ("vllm", "0.33.0", {"swap-space": 4}, "no --swap-space any more", ""),
        (
            "vllm",
            "0.33.0",
            {"enable-mamba-fine-grained-prefix-cache": True},
            "gone since 0.31.0",
            "remove it",
        ),
        ("vllm", "0.33.0", {"block-size": "16"}, "takes a whole number, not '16'", "whole number"),
        ("vllm", "0.33.0", {"block-size": True}, "takes a whole number, not True", ""),
        ("vllm", "0.33.0", {"block-size": 16.0}, "takes a whole number", ""),
        ("vllm", "0.33.0", {"block-size.x": 16}, "has no keys", ""),
        ("vllm", "0.33.0", {"block-size": [16]}, "one value, not a list", ""),
        ("vllm", "0.33.0", {"enable-prefix-caching": "true"}, "takes true or false", ""),
        ("vllm", "0.33.0", {"gpu-memory-utilization": float("nan")}, "a finite number", ""),
        ("vllm", "0.33.0", {"kv-cache-dtype": "fp8_e4m4"}, "cannot be 'fp8_e4m4'", "did you mean fp8_e4m"),
        ("vllm", "0.32.0", {"kv-cache-dtype": "octave_k3v4"}, "since 0.33.0 only", "0.33.0"),
        ("vllm", "0.30.0", {"log-level": "info"}, "since 0.31.0 only", ""),
        ("vllm", "0.29.1", {}, "flags of vllm 0.29.1 are not recorded", "0.30.0 to 0.33.0"),
        ("vllm", "0.34.0", {}, "are not recorded", ""),
        ("vllm", "newest", {}, "is no version", ""),
        ("sglang", "0.5.24", {}, "are not recorded", ""),
        ("sglang", "0.5.23", {"kv-cache-dtype": "int8"}, "cannot be 'int8'", ""),
        ("sglang", "0.5.23", {"disable-radix-cache": False}, "only be switched on", "leave it out"),
        ("sglang", "0.5.21", {"enable-watermark": True}, "since 0.5.22 only", ""),
        ("llama.cpp", "1", {}, "no flags are recorded of llama.cpp", "vllm"),
    ],
)
def test_what_the_engine_would_refuse_is_named(
    engine: str, version: str, settings: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(SpecError) as caught:
        check_flags(engine, version, settings)
    assert message in str(caught.value)
    assert remedy in (caught.value.problems[0].remedy or "")


def test_an_older_version_still_has_what_is_gone_since() -> None:
    check_flags("vllm", "0.30.0", {"enable-mamba-fine-grained-prefix-cache": True})
    check_flags("vllm", "0.33.1", {"block-size": 16})  # a patch release has the flags of its minor version
    check_flags("sglang", "0.5.22.post1", {"page-size": 16})
