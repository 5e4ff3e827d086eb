"""``orchestrator serve-config`` as people meet it, and the folder that a release gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api import ModelShape, OrchestratorError, SpecError, UnsupportedPolicyError
from orchestrator.bundle import write_bundle
from orchestrator.checkpoint import Checkpoint
from orchestrator.cli import app
from orchestrator.deployment import check_engine, expected_traffic, serving_files
from orchestrator.serving import GIB
from orchestrator_serving.vllm import VLLM
from tests.test_serving import LLAMA_8B
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "model")


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", "serve-config", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_files_are_printed_and_the_arithmetic_when_asked_for(model: Path) -> None:
    asked = (model, "--engine", "vllm", "--gpu-memory-gib", "8", "--max-model-len", "128")
    done = call(*asked)
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load(done.stdout)
    assert (settings["max-model-len"], settings["block-size"]) == (128, 16)
    explained = call(*asked, "--explain")
    assert explained.returncode == 0
    assert "- 2 (K and V) x 3 layers x 2 KV heads x 16 x 2 bytes (bfloat16) = 384 bytes per token" in explained.stdout
    assert "## With another element type" in explained.stdout
    document = json.loads(call(*asked, "--json").stdout)
    assert document["plan"]["bytes_per_token"] == 384
    assert document["files"]["vllm.yaml"] == done.stdout
    assert document["plan"]["tensor_parallel"].keys() == {"1", "2", "4"}
    assert document["plan"]["tensor_parallel"]["2"]["bytes_per_token"] == 192
    assert document["plan"]["tensor_parallel"]["4"]["bytes_per_token"] == 192  # two devices keep the same head


def test_any_parameter_can_be_set_and_files_be_written(model: Path, tmp_path: Path) -> None:
    done = call(
        model, "--engine", "vllm", "--max-model-len", "128", "--set", "kv_cache_dtype=fp8", "--output", tmp_path
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "serving" / "vllm"  # where its own README says that it lies
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "kv-plan.json", "vllm.yaml"]
    assert yaml.safe_load((out / "vllm.yaml").read_text())["kv-cache-dtype"] == "fp8"
    again = call(model, "--engine", "vllm", "--max-model-len", "128", "--output", tmp_path)
    assert (again.returncode, again.stdout) == (3, "")
    assert "is there already" in again.stderr


def test_a_configuration_alone_is_planned_with_the_bytes_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    asked = (tmp_path, "--engine", "vllm", "--gpu-memory-gib", "80", "--max-model-len", "32768", "--json")
    refused = call(*asked)
    assert refused.returncode == 3 and "--weight-bytes" in refused.stderr
    plan = json.loads(call(*asked, "--weight-bytes", str(5 * GIB)).stdout)["plan"]
    # 80 GiB x 0.92 - 5 - 1 = 67.6 GiB; a block is 2 MiB
    assert plan["num_blocks"] == int(67.6 * 2**30) // 2**21
    assert plan["max_concurrency"] == plan["num_blocks"] / 2048


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--engine", "vlm"), 2, 'did you mean "vllm"'),
        (("--engine", "release"), 2, "'release' is no serving engine"),
        (("--engine", "vllm", "--set", "block_sise=16"), 2, "did you mean 'block_size'"),
        (("--engine", "vllm", "--set", "block_size=17"), 2, "block_size"),
        (("--engine", "vllm", "--set", "block_size"), 2, "gives no value"),
        (("--engine", "vllm", "--gpu-memory-gib", "0"), 2, "gpu_memory_gib"),
        (("--engine", "vllm", "--gpu-memory-gib", "0.5"), 3, "the model does not fit"),
        (("--engine", "vllm", "--max-model-len", "129"), 2, "128 positions"),
        (("--engine", "vllm", "--set", "policy=streaming_llm"), 2, "cannot keep a KV cache by the policy"),
        (("--engine", "vllm", "--set", "engine_version=0.12.0"), 2, "outside >=0.33,<0.34"),
        (("--engine", "vllm", "--set", "engine_version=new"), 2, "is no version"),
        (("--engine", "vllm", "--set", "tensor_parallel_size=3"), 2, "one of 1, 2, 4"),
        (("--engine", "vllm", "--set", "engine_version=0.32"), 2, "0.32 is outside"),
        (("--engine", "vllm", "--set", "recent_tokens=64"), 2, "means nothing to the policy paged"),
        (("--engine", "vllm", "--set", "prompt_tokens=100", "--set", "answer_tokens=29"), 2, "more than max_model_len"),
        (("--engine", "vllm", "--set", "extra_flags={calculate_kv_scales: true}"), 2, "quantize: kv_scales"),
        (("--engine", "vllm", "--set", "extra_flags={num-gpu-blocks-override: 9}"), 2, "the cache that is planned"),
        (("--engine", "vllm", "--set", "extra_flags={kv-cache-memory-bytes: 9}"), 2, "use pin_cache"),
        (("--engine", "vllm", "--set", "extra_flags={quantization: awq}"), 2, "follows from the release"),
        (("--engine", "vllm", "--set", "extra_flags={nnodes: 2}"), 2, "plan would be of other devices"),
        (("--engine", "vllm", "--set", "extra_flags={compilation-config: x}"), 2, "takes JSON"),
        (("--engine", "vllm", "--weight-bytes", "-1"), 2, "no size"),
    ],
    ids=lambda value: "-".join(value[1:]) if isinstance(value, tuple) else None,
)
def test_mistakes_are_refused_with_the_reason(model: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    with pytest.raises(OrchestratorError) as caught:
        app(["serve-config", str(model), "--max-model-len", "128", *arguments], standalone_mode=False)
    assert caught.value.exit_code == code
    assert said in str(caught.value)
    assert caught.value.problems[0].remedy


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    done = call(tmp_path / "nothing", "--engine", "vllm")
    assert done.returncode in (2, 3) and "Traceback" not in done.stderr
    for change, said in (
        ({"num_hidden_layers": None}, "config.json must give num_hidden_layers"),
        ({"quantization_config": "x"}, "quantization_config as no mapping"),
        ({"layer_types": 5}, "types of layers as a list"),
        ({"num_attention_heads": 3}, "do not divide hidden_size"),
        ({"num_key_value_heads": 5}, "do not divide 32 attention heads"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, **change}), encoding="utf-8")
        with pytest.raises(OrchestratorError, match=said):
            app(["serve-config", str(tmp_path), "--engine", "vllm", "--weight-bytes", "1"], standalone_mode=False)


def test_a_release_holds_the_plan_and_says_what_was_assumed(model: Path, tmp_path: Path) -> None:
    engine = VLLM(gpu_memory_gib=8, max_model_len=128, prompt_tokens=64, answer_tokens=64, shared_prefix_tokens=40)
    write_bundle(Checkpoint(model), [engine], tmp_path)
    folder = tmp_path / "serving" / "vllm"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "kv-plan.json", "vllm.yaml"]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    plan = json.loads((folder / "kv-plan.json").read_text(encoding="utf-8"))
    assert "vllm serve --config serving/vllm/vllm.yaml" in readme
    assert f"{plan['num_blocks']} blocks of 16 tokens" in readme
    assert "Weights take in memory what they take on disk" in readme
    assert plan["traffic"]["blocks_shared"] == 2 and plan["traffic"]["blocks_of_a_sequence"] == 6
    assert plan["other_dtypes"]["fp8"]["bytes_per_token"] == plan["bytes_per_token"] // 2


def test_expected_traffic_counts_the_shared_prefix_once() -> None:
    engine = VLLM(
        gpu_memory_gib=24, max_model_len=8192, prompt_tokens=1000, answer_tokens=200, shared_prefix_tokens=512
    )
    plan = engine.plan(ModelShape.from_config(LLAMA_8B), 5 * GIB)
    traffic = expected_traffic(engine, plan)
    assert traffic is not None
    # 1200 tokens are 75 blocks, of which 32 are shared
    assert (traffic["blocks_shared"], traffic["blocks_of_a_sequence"]) == (32, 43)
    assert traffic["concurrency"] == (plan.num_blocks - 1 - 32) / 43  # vLLM keeps a block for itself
    assert traffic["prefix_room_blocks"] == plan.num_blocks - 1 - 32 - traffic["running"] * 43
    assert expected_traffic(VLLM(), plan) is None


def test_a_policy_that_an_engine_cannot_honour_names_those_that_can() -> None:
    class Evicts(VLLM):
        name = "evicts"
        policies = frozenset({"paged", "streaming_llm"})

    with pytest.raises(UnsupportedPolicyError, match="engines that can: evicts") as caught:
        check_engine(VLLM(policy="streaming_llm", recent_tokens=64), [VLLM, Evicts])
    assert (caught.value.engine, caught.value.policy, caught.value.engines) == ("vllm", "streaming_llm", ("evicts",))
    with pytest.raises(UnsupportedPolicyError, match="no installed engine can"):
        check_engine(VLLM(policy="h2o", recent_tokens=64), [VLLM, Evicts])
    check_engine(Evicts(policy="streaming_llm", recent_tokens=64), [VLLM])
    with pytest.raises(SpecError, match="set recent_tokens"):
        check_engine(Evicts(policy="streaming_llm"), [VLLM])
    plan = Evicts(policy="streaming_llm", sink_tokens=4, recent_tokens=60, max_model_len=8192).plan(
        ModelShape.from_config(LLAMA_8B), 5 * GIB
    )
    assert (plan.held_tokens, plan.blocks_per_sequence, plan.blocks_for(10**6)) == (64, 4, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_tokens": 10}, "only one of prompt_tokens and answer_tokens"),
        ({"prompt_tokens": 10, "answer_tokens": 1, "shared_prefix_tokens": 11}, "more than prompt_tokens"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        check_engine(VLLM(**changes), [VLLM])


def test_the_bytes_of_the_cache_can_be_pinned() -> None:
    engine = VLLM(gpu_memory_gib=24, max_model_len=8192, pin_cache=True)
    files = serving_files(engine, ModelShape.from_config(LLAMA_8B), 5 * GIB)
    plan = json.loads(files["kv-plan.json"])
    settings = yaml.safe_load(files["vllm.yaml"])
    assert settings["kv-cache-memory-bytes"] == plan["num_blocks"] * plan["bytes_per_block"]


def test_traffic_is_put_through_the_planned_cache(model: Path, tmp_path: Path) -> None:
    asked = [str(model), "--engine", "vllm", "--gpu-memory-gib", "1.2", "--max-model-len", "128"]
    drawn = ["--rate", "50", "--requests", "300", "--prompt", "uniform:8-64", "--answer", "fixed:32", "--json"]
    command = [sys.executable, "-m", "orchestrator", "simulate"]
    done = subprocess.run([*command, *asked, *drawn], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    engine = VLLM(gpu_memory_gib=1.2, max_model_len=128)
    plan = engine.plan(ModelShape.from_config(Checkpoint(model).config), Checkpoint(model).weight_bytes())
    assert report["pool"]["num_blocks"] == plan.num_blocks
    assert {name: result["finished"] for name, result in report["policies"].items()} == dict.fromkeys(
        ("paged", "max", "pow2", "oracle"), 300
    )
    assert report["policies"]["paged"]["generated_tokens"] == 300 * 32
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 8, "output_length": 0}\n', encoding="utf-8")
    with pytest.raises(OrchestratorError, match=r"trace\.jsonl:1"):
        app(["simulate", *asked, "--trace", str(trace)], standalone_mode=False)
    with pytest.raises(OrchestratorError, match="there is no traffic"):
        app(["simulate", *asked], standalone_mode=False)
    with pytest.raises(OrchestratorError, match="cannot be written"):
        app(["simulate", *asked, *drawn, "--plot", str(tmp_path / "no" / "w.svg")], standalone_mode=False)
