"""The example specifications: each is valid, and every method and parameter in it exists."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest
import yaml

from orchestrator.deployment import KV_METRICS
from orchestrator.home import Settings
from orchestrator.method import Evaluator, Stage
from orchestrator.plugins import Methods, discover
from orchestrator.run import run_locally
from orchestrator.spec import load_spec, validate_strictly
from tests.test_run import Watcher
from tests.tiny import make_model

SPECS = sorted((Path(__file__).parents[1] / "flows" / "specs").glob("*.yaml"))


@pytest.fixture(scope="module")
def methods() -> Methods:
    return discover()


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_an_example_is_valid(path: Path, methods: Methods) -> None:
    spec = load_spec(path).spec
    for step in spec.steps:
        method = validate_strictly(methods.find(step.stage, step.method).cls, step.with_)
        declared = set(method.declared()) if isinstance(method, Evaluator) else set()
        declared |= {f"{name}.{engine}" for name in KV_METRICS for entry in step.engines for engine in entry}
        for pattern in (*step.require, *step.must_not_fall):
            assert fnmatch.filter(declared, pattern), pattern
        for name, values in (step.policy or {}).items():
            validate_strictly(methods.find(Stage.VALIDATE, name).cls, values or {})
        for engine in step.engines:
            for name, values in engine.items():
                validate_strictly(methods.find(Stage.REGISTER, name).cls, values or {})


def test_there_are_examples() -> None:
    assert len(SPECS) >= 2


def shrunk(path: Path, folder: Path) -> Path:
    """The example on a tiny model and a little text, its gates wide open; the chain and the methods are its own."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    (folder / "web.txt").write_text("a page about ships that sail over cold water. " * 400, encoding="utf-8")
    held_out = {"code": "return seven wizards for each judge", "prose": "some pens write down what a dog says"}
    for name, words in held_out.items():
        (folder / f"{name}.txt").write_text(f"{words}. " * 400, encoding="utf-8")
    if (path.parent / "tasks").is_dir():
        shutil.copytree(path.parent / "tasks", folder / "tasks")
    make_model(folder / "model")
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    spec["model"] = {"id": "./model"}
    small = {
        "source": "text.txt",
        "sequences": 8,
        "length_tokens": 32,
        "group_size": 32,
        "round_to": 32,
        "windows": 4,
        "lora_updates": 2,
        "updates": 2,
        "teacher_top_k": 8,
        "prompt_tokens": 8,
        "answer_tokens": 8,
        "layers": 1,
        "stream_tokens": 256,
        "window_tokens": 32,
        "window": 28,
        "sources": {name: f"{name}.txt" for name in held_out},
        "corpora": {"own": "text.txt", "web": "web.txt"},
        "seeds": [0],
        "batches": [1, 2],
        "questions": 10,
    }
    for step in spec["steps"]:
        given = step.get("with") or {}
        step["with"] = {key: small.get(key, value) for key, value in given.items()}
        if "register" in step:
            step["with"].pop("uri", None)
        if "validate" in step and step["validate"] in ("perplexity", "fidelity", "robustness"):
            step["with"] |= {"length_tokens": 32, "windows": 4}
        if step.get("validate") == "footprint":
            step["with"] |= {"new_tokens": 4, "repeats": 1}
        if step.get("validate") == "tasks":
            step["with"] |= {"questions": 10, "length_tokens": 128}
        for name, values in (step.get("policy") or {}).items():
            step["policy"][name] = {key: small.get(key, value) for key, value in values.items()}
        step.pop("require", None)
        if "formats" in step:  # no GGUF: llama.cpp does not know the tiny model's tokenizer
            step["formats"] = [entry for entry in step["formats"] if "gguf" not in entry]
            step["engines"] = [entry for entry in step["engines"] if "llama_cpp" not in entry]
        step.pop("must_not_fall", None)
        for engine in step.get("engines", ()):
            for values in engine.values():
                values["max_model_len"] = 64
                if "recent_tokens" in values:
                    values["recent_tokens"] = 32
    small_path = folder / path.name
    small_path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return small_path


@pytest.mark.parametrize(
    "name",
    [
        *("awq.yaml", "llm-pruner.yaml", "minillm.yaml", "hybrid.yaml"),
        *("streaming-llm.yaml", "gated.yaml", "robustness.yaml"),
    ],
)
def test_an_example_runs_at_small_scale(name: str, tmp_path: Path, methods: Methods, tracking_uri: str) -> None:
    path = Path(__file__).parents[1] / "flows" / "specs" / name
    if name == "gated.yaml":
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    execution = run_locally(shrunk(path, tmp_path), methods, Settings(tmp_path / "home", tracking_uri), Watcher())
    document = execution.document()
    assert document["release"] is not None
    metrics = {name: value for step in document["steps"] for name, value in step["metrics"].items()}
    ratios = [value for name, value in metrics.items() if name.startswith("perplexity_ratio") and "_std" not in name]
    assert ratios and all(0.5 < ratio < 3 for ratio in ratios)
