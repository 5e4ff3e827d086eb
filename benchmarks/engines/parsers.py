"""Our serving files before the engines' own parsers, and our KV plans beside vLLM's own planner.

    python -m benchmarks.engines.parsers [--save]

Models: the published configurations (models.py), and checkpoints made on the spot by this project's own runs of
reference-7m: dense, 4-bit weights, and with scales for an fp8 cache. vLLM parses, makes its whole engine configuration
of an H100, builds the model on the meta device and plans; SGLang parses. No GPU, no
weights: some three minutes, and the installation once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engines.environment import SGLANG, VLLM, python
from benchmarks.engines.models import config_of
from benchmarks.material import shared_data
from benchmarks.ours import Calibration, compress
from benchmarks.processes import peer_environment, run
from benchmarks.results import circumstances, save
from orchestrator.api import ModelShape, OrchestratorError, ServingEngine
from orchestrator_serving import sglang, vllm

GIB = 2**30
LATENT: dict[str, Any] = {"block_size": 64}
LARGE: dict[str, Any] = {"gpu_memory_gib": 80, "max_model_len": 8192}
# Model, billions of bytes of weights, parameters of both engines.
CASES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("Llama-3.1-8B", 16, {}),
    ("Qwen2.5-7B", 15, {}),
    ("Falcon-7B", 14, {"max_model_len": 2048}),
    ("Mistral-7B-v0.1", 14, {}),
    ("DeepSeek-V3", 380, {**LATENT, "tensor_parallel_size": 8}),
    ("gpt-oss-20b", 13, {"max_model_len": 32768}),
    ("gpt-oss-120b", 61, {}),
    ("Gemma-3-27B", 27, {}),
    ("Gemma-3-4B", 8, {"max_model_len": 32768}),
    ("Llama-4-Scout", 55, {}),
    ("Qwen3-Next-80B", 42, {}),
    ("Qwen3.6-27B", 27, {}),
    ("Jamba-v0.1", 30, {}),
    ("granite-4.0-h-small", 32, {}),
)
ENGINES: dict[str, type[ServingEngine]] = {"vllm": vllm.VLLM, "sglang": sglang.SGLang}
# Runs of this project, on the model that is at hand.
STEPS: dict[str, dict[str, Any]] = {
    "reference-7m W4A16": {"quantize": "gptq", "with": {"num_bits": 4, "group_size": 32}},
    "reference-7m fp8 KV scales": {"quantize": "kv_scales"},
}


def checkpoints(folder: Path) -> dict[str, Path]:
    """The dense model and those that our runs make of it."""
    model = shared_data() / "models" / "reference-7m"
    text = shared_data() / "text" / "heldout-code.txt"
    made = {"reference-7m dense": model}
    for name, step in STEPS.items():
        result = compress(model, Calibration(text, 16, 128), step, folder / name.replace(" ", "-"), folder / "home")
        made[name] = Path(result["steps"][-1]["artifact"]["path"])
    return made


def write(engine: ServingEngine, config: dict[str, Any], weight_bytes: int, folder: Path) -> dict[str, Any]:
    """Render one engine's files into a folder; return our plan, or why there is none."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        engine.preflight()
        shape = ModelShape.from_config(config)
        plan = engine.plan(shape, weight_bytes)
        for name, text in engine.render(shape, plan).items():
            (folder / name).write_text(text, encoding="utf-8")
    except OrchestratorError as error:
        shutil.rmtree(folder)
        return {"declined": str(error)}
    (folder / "available.txt").write_text(str(plan.available_bytes), encoding="utf-8")
    return {
        "num_blocks": plan.num_blocks,
        "kv_cache_tokens": plan.kv_tokens,
        "max_concurrency": plan.max_concurrency,
        "bytes_per_block": plan.bytes_per_block,
    }


def ask(engine: str, folders: list[Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """What the engine says of each folder."""
    result = scratch / f"{engine}.json"
    run([python(), "-m", "benchmarks.engines.parse", engine, result, *folders], peer_environment())
    answers: dict[str, dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
    return answers


def measure(scratch: Path) -> list[dict[str, Any]]:
    """All models before all engines."""
    inputs = [(name, config_of(name), int(size * 1e9), {**LARGE, **more}) for name, size, more in CASES]
    for name, path in checkpoints(scratch / "ours").items():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        length = min(512, config["max_position_embeddings"])
        inputs.append((name, config, size, {"gpu_memory_gib": 24, "max_model_len": length}))
    rows = []
    for engine, kind in ENGINES.items():
        folders: dict[str, Path] = {}
        ours: dict[str, dict[str, Any]] = {}
        for name, config, size, parameters in inputs:
            folder = scratch / engine / name.replace(" ", "-")
            ours[name] = write(kind.model_validate(parameters), config, size, folder)
            if folder.is_dir():
                folders[name] = folder
        answers = ask(engine, list(folders.values()), scratch)
        for name, plan in ours.items():
            answer = answers[folders[name].name] if name in folders else {}
            rows.append(
                {"engine": engine, "model": name, "ours": plan, "engine_says": answer, **_verdict(plan, answer)}
            )
    return rows


def _verdict(plan: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    if "declined" in plan:
        return {"accepted": None, "equal": None}
    if "refused" in answer:
        return {"accepted": False, "equal": None}
    compared = ("num_blocks", "kv_cache_tokens", "max_concurrency", "bytes_per_block")
    equal = all(plan[key] == answer[key] for key in compared) if "num_blocks" in answer else None
    return {"accepted": True, "equal": equal}


def main() -> None:
    """Print a table, and write the file of results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch))
    shown = {True: "yes", False: "NO", None: "-"}
    print(f"{'engine':8}{'model':30}{'accepted':10}{'plan equal':12}blocks, ours / engine's")
    for row in rows:
        blocks = f"{row['ours'].get('num_blocks', '-')} / {row['engine_says'].get('num_blocks', '-')}"
        why = row["ours"].get("declined") or row["engine_says"].get("refused") or ""
        head = f"{row['engine']:8}{row['model']:30}{shown[row['accepted']]:10}{shown[row['equal']]:12}"
        print(f"{head}{blocks}  {why[:110]}")
    if arguments.save:
        save("engines", {**circumstances(), "vllm": VLLM, "sglang": SGLANG, "rows": rows})


if __name__ == "__main__":
    main()
