"""Record what vLLM's own planner makes of a model's KV cache, for the tests of ours.

    .peers/vllm/bin/python -m benchmarks.engines.record_vllm_kv tests/golden/vllm_0_33_kv.json

Nothing here calculates: the engine reads the configuration, builds the model on the meta device, asks each layer what
it keeps, groups the layers and divides the bytes. Only the bytes are given, which it would measure on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.engines.models import config_of
from benchmarks.engines.without_gpu import on_meta, pretend

GIB = 2**30
# Each overrides what is given here. available: bytes left to the cache, on one device.
DEFAULTS: dict[str, Any] = {
    "tp": 1,
    "block": None,
    "dtype": "auto",
    "length": 32768,
    "batched": 8192,
    "available": 40 * GIB,
    "prefix": True,
    "hybrid_off": False,
    "async": True,
    "chunked": True,
}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Llama-3.1-8B", {}),
    ("Llama-3.1-8B", {"available": 12345678901, "length": 10001}),
    ("Llama-3.1-8B", {"block": 64, "length": 131072}),
    ("Llama-3.1-8B", {"block": 128, "tp": 2}),
    ("Llama-3.1-8B", {"tp": 8, "available": 60 * GIB}),
    ("Llama-3.1-8B", {"dtype": "fp8"}),
    ("Llama-3.1-8B", {"dtype": "fp8_e5m2"}),
    ("Llama-3.1-8B", {"dtype": "int8_per_token_head"}),
    ("Llama-3.1-8B", {"dtype": "fp8_per_token_head", "tp": 4}),
    ("Llama-3.1-8B", {"dtype": "int4_per_token_head", "block": 32}),
    ("Llama-3.1-8B", {"dtype": "turboquant_k8v4"}),
    ("Llama-3.1-8B", {"dtype": "turboquant_4bit_nc"}),
    ("Llama-3.1-8B", {"dtype": "turboquant_k3v4_nc"}),
    ("Llama-3.1-8B", {"dtype": "turboquant_3bit_nc"}),
    ("Llama-3.1-8B", {"dtype": "fp8_ds_mla"}),
    ("Llama-3.1-8B", {"available": 100 * 2**20}),
    ("Llama-3.1-8B", {"available": 4 * GIB}),
    ("Llama-3.1-8B", {"available": 4 * GIB + 16 * 131072}),
    ("Llama-2-7B", {"length": 4096}),
    ("Qwen2.5-7B", {}),
    ("Qwen2.5-7B", {"tp": 4, "block": 32}),
    ("Falcon-7B", {"length": 2048}),
    ("DeepSeek-V3", {}),
    ("DeepSeek-V3", {"block": 64, "tp": 8}),
    ("DeepSeek-V3", {"dtype": "fp8"}),
    ("DeepSeek-V3", {"dtype": "fp8_ds_mla"}),
    ("DeepSeek-V3.2", {"block": 64}),
    ("DeepSeek-V3.2", {"dtype": "fp8_ds_mla", "tp": 8}),
    ("gpt-oss-120b", {}),
    ("gpt-oss-120b", {"length": 131072, "tp": 2}),
    ("gpt-oss-120b", {"length": 131072, "batched": 2048}),
    ("gpt-oss-120b", {"length": 131072, "async": False}),
    ("gpt-oss-120b", {"hybrid_off": True}),
    ("gpt-oss-120b", {"dtype": "fp8", "length": 131072}),
    ("gpt-oss-20b", {"length": 131072, "available": 10 * GIB}),
    ("gpt-oss-20b", {"length": 8192, "batched": 1024, "available": 10 * GIB}),
    ("Gemma-3-27B", {"length": 131072}),
    ("Gemma-3-27B", {"length": 131072, "batched": 2048, "tp": 4}),
    ("Gemma-3-27B", {"length": 1000}),
    ("Gemma-3-27B", {"length": 131072, "hybrid_off": True}),
    ("Gemma-3-4B", {"length": 131072}),
    ("Gemma-3-1B", {"tp": 2}),
    ("Mistral-7B-v0.1", {}),
    ("Mistral-7B-v0.1", {"batched": 2048, "block": 32}),
    ("Mistral-7B-v0.1", {"hybrid_off": True}),
    ("Qwen3-Next-80B", {}),
    ("Qwen3-Next-80B", {"prefix": False}),
    ("Qwen3-Next-80B", {"tp": 2, "length": 262144}),
    ("Qwen3-Next-80B", {"dtype": "fp8"}),
    ("Qwen3.6-27B", {}),
    ("Qwen3.6-27B", {"prefix": False, "length": 262144}),
    ("Qwen3.6-27B", {"tp": 4}),
    ("Jamba-v0.1", {}),
    ("Jamba-v0.1", {"prefix": False, "tp": 2}),
    ("granite-4.0-h-small", {}),
    ("granite-4.0-h-small", {"prefix": False}),
    ("granite-4.0-h-small", {"tp": 4, "block": 64}),
    ("Llama-4-Scout", {}),
    ("Llama-4-Scout", {"length": 1048576, "available": 64 * GIB}),
    ("Llama-4-Scout", {"tp": 8, "length": 65536}),
    ("Llama-4-Scout", {"chunked": False}),
)


def prepare() -> None:
    """Start vLLM's process groups, once; of one rank, whatever the size that layers are told."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.v1.worker.workspace import init_workspace_manager

    with tempfile.NamedTemporaryFile() as file, set_current_vllm_config(VllmConfig()):
        method = f"file://{file.name}.store"
        torch.distributed.init_process_group("gloo", init_method=method, rank=0, world_size=1)
        parallel_state.init_distributed_environment(1, 0, method, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    init_workspace_manager(torch.device("meta"))


def engine_config(folder: Path, settings: dict[str, Any]):
    """The engine's whole configuration, as `vllm serve` makes it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    # The engine's default is "1"; its own message says otherwise.
    os.environ["VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"] = str(int(settings["chunked"]))
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        tensor_parallel_size=settings["tp"],
        distributed_executor_backend="mp",
        block_size=settings["block"],
        kv_cache_dtype=settings["dtype"],
        max_model_len=settings["length"],
        max_num_batched_tokens=settings["batched"],
        enable_prefix_caching=settings["prefix"],
        async_scheduling=settings["async"],
        disable_hybrid_kv_cache_manager=True if settings["hybrid_off"] else None,
    )
    return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def layers_of(config):
    """What each layer keeps, after the engine has settled the block size, and the layout."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    parallel_state._TP.world_size = config.parallel_config.tensor_parallel_size
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        on_meta(),
    ):
        initialize_model(config)
        current_platform.update_block_size_for_backend(config)
        specs = get_kv_cache_spec(config)
        layers = config.compilation_config.static_forward_context
        backends = [layers[name].get_attn_backend() for name in specs]
        names = [layout.name for layout in get_supported_kv_cache_layouts(dict.fromkeys(backends))]
        layout = resolve_kv_cache_layout(config, [names], specs.values())
    return specs, sorted({backend.get_name() for backend in backends}), layout.name


def plan(config, available: int) -> dict[str, Any]:
    """What the engine makes of so many bytes: of the result, what a planner must find."""
    from vllm.utils.math_utils import cdiv
    from vllm.v1.core import kv_cache_planning, kv_cache_utils
    from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder
    from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

    specs, backends, layout = layers_of(config)
    groups = kv_cache_planning.get_global_kv_cache_groups(config, [specs])
    found = {
        "backends": backends,
        "layout": layout,
        "effective_block_size": config.cache_config.block_size,
        "mamba_cache_mode": config.cache_config.mamba_cache_mode,
        "max_in_flight_tokens": config.max_in_flight_tokens,
        "bytes_per_block": kv_cache_planning._pool_bytes_per_block_from_builder(
            get_kv_cache_config_builder(config), config, groups
        ),
        "groups": [
            {
                "kind": get_kv_cache_spec_kind(group.kv_cache_spec).value,
                "layers": len(group.layer_names),
                "block_size": group.kv_cache_spec.block_size,
                # bytes of one layer's block, and how many layers have it
                "pages": sorted(Counter(spec.page_size_bytes for spec in _specs(group)).items(), reverse=True),
                "sliding_window": get_kv_cache_spec_sliding_window(group.kv_cache_spec),
                "blocks_per_sequence": cdiv(
                    group.kv_cache_spec.max_memory_usage_bytes(config), group.kv_cache_spec.page_size_bytes
                ),
            }
            for group in groups
        ],
    }
    try:
        configs = kv_cache_planning.get_kv_cache_configs(config, [specs], [available], groups)
    except ValueError as error:
        return {**found, "refused": str(error)}
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config(configs)
    tokens, concurrency = kv_cache_utils.get_kv_cache_capacity(config, scheduler)
    return {
        **found,
        "num_blocks": scheduler.num_blocks,
        "kv_cache_tokens": tokens,
        "max_concurrency": concurrency,
    }


def _specs(group):
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    spec = group.kv_cache_spec
    uniform = isinstance(spec, UniformTypeKVCacheSpecs)
    return list(spec.kv_cache_specs.values()) if uniform else [spec] * len(group.layer_names)


def record(name: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case; `refused` says why the engine would not start."""
    settings = {**DEFAULTS, **changes}
    config = config_of(name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    case = {
        "name": name,
        "tensor_parallel_size": settings["tp"],
        "block_size": settings["block"],
        "kv_cache_dtype": settings["dtype"],
        "max_model_len": settings["length"],
        "max_num_batched_tokens": settings["batched"],
        "available_bytes": settings["available"],
        "enable_prefix_caching": settings["prefix"],
        "async_scheduling": settings["async"],
        "disable_hybrid_kv_cache_manager": settings["hybrid_off"],
        "chunked_local_with_hybrid": settings["chunked"] and "attention_chunk_size" in config,
    }
    try:
        return {**case, **plan(engine_config(folder, settings), settings["available"])}
    except (ValueError, NotImplementedError) as error:
        return {**case, "refused": str(error).strip()[:600]}


def main() -> None:
    """Record all cases, or those of the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", nargs="*", help="only these; then nothing is written")
    arguments = parser.parse_args()
    pretend()
    prepare()
    import vllm

    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in CASES:
            if arguments.models and name not in arguments.models:
                continue
            case = record(name, changes, Path(folder))
            shown = case.get("num_blocks", case.get("refused", ""))
            print(name, changes, case.get("effective_block_size"), case.get("backends"), shown, flush=True)
            cases.append(case)
    if not arguments.models:
        names = dict.fromkeys(case["name"] for case in cases)
        models = ",\n".join(f"  {json.dumps(name)}: {json.dumps(config_of(name))}" for name in names)
        rows = ",\n".join(f"  {json.dumps(case)}" for case in cases)
        head = f'"vllm": {json.dumps(vllm.__version__)},\n"device": "H100 80 GB"'
        text = f'{{\n{head},\n"models": {{\n{models}\n}},\n"cases": [\n{rows}\n]\n}}\n'
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
