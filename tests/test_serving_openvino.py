"""OpenVINO GenAI serves a release from its own files, and its cache is what the plan says.

Shape legend: T = tokens of a sequence, V = vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openvino_genai
import pytest
import torch
from openvino import Core

import orchestrator
from orchestrator.api import Checkpoint, Context, KVPlan, ModelShape, OrchestratorError, SpecError
from orchestrator.bundle import write_bundle
from orchestrator.deployment import serving_files
from orchestrator.formats import write_formats
from orchestrator.serving_engine import UnsupportedPolicyError
from orchestrator_export.openvino import OpenVINO
from orchestrator_quantization.rtn import RTN
from orchestrator_serving.openvino_genai import OpenVINOGenAI
from tests import tiny
from tests.test_gguf import compressed, whole_tokenizer
from tests.tiny import make_model

MODEL = Path(orchestrator.__file__).parent / "quickstart" / "model"
PROMPTS = ("def read_text(path):\n", "class Reader:\n", "import os\n")
SMALL: dict[str, Any] = {
    "gpu_memory_gib": 0.02, "activation_gib": 0.0, "max_model_len": 300, "inference_precision": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model in 4 bits as a release with its OpenVINO form."""
    folder = tmp_path_factory.mktemp("openvino")
    model = compressed(Checkpoint(MODEL), RTN(num_bits=4, group_size=32), folder / "model")
    (folder / "release").mkdir()
    write_bundle(model, [OpenVINOGenAI(**SMALL)], folder / "release")
    write_formats([OpenVINO(tokens=64)], model, folder / "release", {}, Context(0, model, None, folder / "scratch"))
    return folder / "release"


def rendered(files: Path, target: Path, engine: OpenVINOGenAI, model: Checkpoint | None = None) -> tuple[Path, KVPlan]:
    """A release's folder for another engine, beside the same formats."""
    model = model or Checkpoint(files)
    engine.preflight()
    shape = ModelShape.from_config(model.config)
    folder = target / "serving" / engine.name
    folder.mkdir(parents=True)
    for name, text in serving_files(engine, shape, model.weight_bytes()).items():
        (folder / name).write_text(text)
    (target / "formats").symlink_to(files / "formats")
    return folder, engine.plan(shape, model.weight_bytes())


def pipeline_of(folder: Path) -> Any:
    """What the program in a serving folder loads."""
    spec = importlib.util.spec_from_file_location("released_pipeline", folder / "pipeline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder)


def generate(pipeline: Any, prompt: str, tokens: int, number: int = 0) -> tuple[list[int], list[int]]:
    """Greedily generated tokens, and the percentage of blocks in use after each step."""
    wanted = openvino_genai.GenerationConfig()
    wanted.max_new_tokens, wanted.do_sample, wanted.ignore_eos = tokens, False, True
    handle = pipeline.add_request(number, prompt, wanted)
    used = []
    while pipeline.has_non_finished_requests():
        pipeline.step()
        used.append(pipeline.get_metrics().cache_usage)
    return list(handle.read_all()[0].generated_ids), used


def shortfalls(model: Any, prompt_T: list[int], made_T: list[int]) -> torch.Tensor:
    """By how much each generated token is less probable than the best one, nats, as Transformers computes it."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt_T + made_T])).logits[0].float()
    log_p_TV = logits_TV[len(prompt_T) - 1 : -1].log_softmax(-1)
    return log_p_TV.amax(-1) - log_p_TV[range(len(made_T)), made_T]


def test_a_release_answers_as_transformers_does_in_the_cache_that_was_planned(release: Path, tmp_path: Path) -> None:
    """Three prompts at once, by the program of the release, started from elsewhere."""
    folder = release / "serving" / "openvino_genai"
    command = [sys.executable, str(folder / "pipeline.py"), "--tokens", "60", *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *answers, figures = [json.loads(line) for line in done.stdout.splitlines()]
    plan = json.loads((folder / "kv-plan.json").read_text())
    assert figures["cache_size_in_bytes"] == plan["num_blocks"] * plan["bytes_per_block"]
    model, tokenizer = Checkpoint(release).load(torch.float32), Checkpoint(release).load_tokenizer()
    longest = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        short_T = shortfalls(model, ids, answer["tokens"])
        assert answer["prompt"] == prompt and float(short_T.max()) < 0.05
        assert answer["text"] == tokenizer.decode(answer["tokens"], skip_special_tokens=True)
        longest.append(-(-(len(ids) + len(answer["tokens"])) // plan["block_size"]))
    used = figures["max_cache_usage_percent"] / 100 * plan["num_blocks"]
    assert max(longest) <= round(used, 3) <= sum(longest)  # all at the same time, in blocks of their own


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("float32", {}),
        ("float16", {}),
        ("bfloat16", {"inference_precision": "bfloat16"}),
        ("u8", {}),
        ("u8", {"keys_by_channel": False}),
        ("u4", {}),
        ("u4", {"keys_by_channel": False}),
    ],
)
def test_every_element_type_takes_what_was_planned(
    heads_of_16: Path, tmp_path: Path, kind: str, parameters: dict[str, Any]
) -> None:
    if kind == "bfloat16" and "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("OpenVINO computes in bfloat16 only where the processor does")
    engine = OpenVINOGenAI(**{**SMALL, "max_model_len": 100, "kv_cache_dtype": kind, **parameters})
    folder, plan = rendered(heads_of_16, tmp_path / "release", engine, Checkpoint(heads_of_16 / "model"))
    pipeline = pipeline_of(folder)
    made, _ = generate(pipeline, "the quick", 3)
    reported = pipeline.get_metrics().cache_size_in_bytes
    assert len(made) == 3
    assert reported == plan.num_blocks * plan.bytes_per_block * (2 if kind == "u4" else 1)
    assert str(reported) in " ".join(engine.notes(ModelShape.from_config(Checkpoint(MODEL).config), plan))


@pytest.fixture(scope="module")
def heads_of_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks are not square: 32 tokens, heads of 16 elements."""
    folder = tmp_path_factory.mktemp("heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "VOCABULARY", 384)
        make_model(folder / "model", "qwen2", dtype=torch.float32, tokenizer=False)
    config = json.loads((folder / "model/config.json").read_text())
    config |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
    (folder / "model/config.json").write_text(json.dumps(config))
    whole_tokenizer(folder / "model")
    model = Checkpoint(folder / "model")
    write_formats([OpenVINO(tokens=16)], model, folder, {}, Context(0, model, None, folder / "scratch"))
    return folder


@pytest.mark.parametrize(
    ("parameters", "blocks"),
    [
        # 32 + 64 + 32 tokens, and the block that is being filled
        ({"policy": "streaming_llm", "recent_tokens": 64, "apply_rotation": True}, 5),
        ({"policy": "h2o", "recent_tokens": 32, "heavy_tokens": 64}, 5),
        ({"policy": "streaming_llm", "sink_tokens": 64, "recent_tokens": 32, "kv_cache_dtype": "u8"}, 5),
    ],
)
def test_eviction_bounds_the_cache_however_long_the_text_becomes(
    release: Path, tmp_path: Path, parameters: dict[str, Any], blocks: int
) -> None:
    traffic = {"prompt_tokens": 60, "answer_tokens": 240}
    folder, plan = rendered(release, tmp_path / "release", OpenVINOGenAI(**{**SMALL, **parameters, **traffic}))
    assert plan.blocks_per_sequence == blocks
    made, used = generate(pipeline_of(folder), PROMPTS[0], 320)
    assert len(made) == 320  # with the prompt 11 blocks, if all were kept
    assert round(max(used) / 100 * plan.num_blocks, 3) == blocks
    if parameters.get("apply_rotation"):  # nothing is evicted before 128 tokens
        free, _ = rendered(release, tmp_path / "paged", OpenVINOGenAI(**SMALL))
        assert made[:100] == generate(pipeline_of(free), PROMPTS[0], 100)[0]


def test_prompts_that_are_read_take_what_was_planned_and_then_less(release: Path, tmp_path: Path) -> None:
    """Two prompts in one step, in blocks of the pool that the plan gives to two sequences."""
    tokenizer = Checkpoint(release).load_tokenizer()
    texts = ["".join(f"def {name}_{number}(path):\n" for number in range(40)) for name in ("read", "write")]
    prompts = [tokenizer.decode(tokenizer(text)["input_ids"][:256], skip_special_tokens=True) for text in texts]
    assert [len(tokenizer(prompt)["input_ids"]) for prompt in prompts] == [256, 256]
    engine = OpenVINOGenAI(
        **SMALL | {"gpu_memory_gib": (Checkpoint(release).weight_bytes() + 18.5 * 49152) / 0.92 / 2**30},
        policy="streaming_llm", recent_tokens=64, prompt_tokens=256, answer_tokens=40, prefix_caching=False,
        max_num_batched_tokens=600,
    )  # fmt: skip
    folder, plan = rendered(release, tmp_path / "release", engine)
    assert (plan.num_blocks, plan.blocks_per_sequence, plan.max_concurrency) == (18, 9, 2.0)
    pipeline = pipeline_of(folder)
    wanted = openvino_genai.GenerationConfig()
    wanted.max_new_tokens, wanted.do_sample, wanted.ignore_eos = 40, False, True
    handles = [pipeline.add_request(number, prompt, wanted) for number, prompt in enumerate(prompts)]
    used, peaks = [], []
    while pipeline.has_non_finished_requests():
        pipeline.step()
        metrics = pipeline.get_metrics()
        used.append(round(metrics.cache_usage / 100 * plan.num_blocks, 3))
        peaks.append(round(metrics.max_cache_usage / 100 * plan.num_blocks, 3))
    assert [len(handle.read_all()[0].generated_ids) for handle in handles] == [40, 40]
    assert len(used) == 40  # both were read in the first step: none waited, none was preempted
    # Whole prompts, whole prompts with a token more, and then what eviction leaves.
    assert (used[0], used[1], max(used[2:]), max(peaks)) == (16, 18, 10, 18)


@pytest.mark.parametrize(
    ("parameters", "blocks", "steady"),
    [
        ({"prompt_tokens": 256, "answer_tokens": 44}, 9, 5),
        ({"prompt_tokens": 255, "answer_tokens": 44}, 8, 5),
        ({"prompt_tokens": 10, "answer_tokens": 200}, 5, 5),
        ({}, 10, 5),  # nothing is known of the prompts: ceil(300 / 32)
        ({"max_model_len": 100}, 4, 4),  # never evicted
        ({"policy": "h2o", "heavy_tokens": 96, "prompt_tokens": 250, "answer_tokens": 10}, 8, 7),
    ],
)
def test_a_sequence_is_counted_at_its_largest(parameters: dict[str, Any], blocks: int, steady: int) -> None:
    engine = OpenVINOGenAI(**{**SMALL, "policy": "streaming_llm", "recent_tokens": 64, **parameters})
    engine.preflight()
    shape = ModelShape.from_config(Checkpoint(MODEL).config)
    plan = engine.plan(shape, 1 << 20)
    assert plan.blocks_per_sequence == plan.blocks_for(plan.max_model_len) == blocks
    assert plan.max_concurrency == plan.num_blocks / blocks
    notes = " ".join(engine.notes(shape, plan))
    assert f"after that a sequence holds {steady} at most" in notes
    assert f"longest prompt that fits is {plan.max_model_len - 1} tokens" in notes
    assert ("taken to be up to max_model_len" in notes) is ("prompt_tokens" not in parameters)


def test_a_prompt_that_was_there_before_is_not_read_again(release: Path, tmp_path: Path) -> None:
    prompt = "".join(f"def read_{number}(path):\n    return path\n" for number in range(16))
    length = len(Checkpoint(release).load_tokenizer()(prompt)["input_ids"])
    steps = {}
    for cached in (True, False):
        engine = OpenVINOGenAI(**SMALL, prefix_caching=cached, max_num_batched_tokens=32)
        folder, _ = rendered(release, tmp_path / str(cached), engine)
        pipeline = pipeline_of(folder)
        first, second = generate(pipeline, prompt, 4), generate(pipeline, prompt, 4, number=1)
        assert first[0] == second[0]
        steps[cached] = len(first[1]), len(second[1])
    reading = -(-length // 32)
    assert reading > 5
    assert steps[False] == (reading + 3, reading + 3)
    assert steps[True][0] == reading + 3 and steps[True][1] <= 2 + 3


def test_requests_join_while_others_are_answered(release: Path, tmp_path: Path) -> None:
    """Continuous batching: a late, short request is done before an early, long one, and neither changes."""
    folder, _ = rendered(release, tmp_path / "release", OpenVINOGenAI(**SMALL))
    pipeline = pipeline_of(folder)
    alone = [generate(pipeline, prompt, tokens)[0] for prompt, tokens in ((PROMPTS[0], 60), (PROMPTS[1], 10))]
    handles, wanted = [], []
    for tokens in (60, 10):
        wanted.append(openvino_genai.GenerationConfig())
        wanted[-1].max_new_tokens, wanted[-1].do_sample, wanted[-1].ignore_eos = tokens, False, True
    handles.append(pipeline.add_request(10, PROMPTS[0], wanted[0]))
    for _ in range(20):
        pipeline.step()
    handles.append(pipeline.add_request(11, PROMPTS[1], wanted[1]))
    steps = 0
    while handles[1].get_status() == openvino_genai.GenerationStatus.RUNNING:
        pipeline.step()
        steps += 1
    assert steps == 10 and pipeline.has_non_finished_requests()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    assert [list(handle.read_all()[0].generated_ids) for handle in handles] == alone


def test_a_pool_that_is_too_small_for_all_preempts_and_answers_them_all_the_same(release: Path, tmp_path: Path) -> None:
    room = Checkpoint(release).weight_bytes() + 6.5 * 49152  # bytes of a block
    tight = {**SMALL, "gpu_memory_gib": room / 0.92 / 2**30, "max_model_len": 96}
    folder, plan = rendered(release, tmp_path / "release", OpenVINOGenAI(**tight, prefix_caching=False))
    settings = json.loads((folder / "pipeline.json").read_text())
    settings["scheduler"]["max_num_seqs"] = 8  # more than the plan would run at once
    (folder / "pipeline.json").write_text(json.dumps(settings))
    pipeline = pipeline_of(folder)
    alone = [generate(pipeline, prompt, 80)[0] for prompt in PROMPTS]
    assert plan.num_blocks == 6  # each of the three takes 3 in the end
    wanted = openvino_genai.GenerationConfig()
    wanted.max_new_tokens, wanted.do_sample, wanted.ignore_eos = 80, False, True
    handles = [pipeline.add_request(number, prompt, wanted) for number, prompt in enumerate(PROMPTS)]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    assert [list(handle.read_all()[0].generated_ids) for handle in handles] == alone


# Without OpenVINO.


@pytest.mark.parametrize(
    ("parameters", "changes", "said"),
    [
        ({"tensor_parallel_size": 2}, {}, "serves a model on one CPU"),
        ({"policy": "window", "recent_tokens": 64}, {}, "policy 'window'"),
        ({"policy": "h2o", "recent_tokens": 64}, {}, "heavy_tokens"),
        ({"policy": "streaming_llm"}, {}, "set recent_tokens"),
        ({"kv_cache_dtype": "bfloat16"}, {}, "only where it computes in it, not in float32"),
        ({"kv_cache_dtype": "float32", "inference_precision": "bfloat16"}, {}, "not in bfloat16"),
        (
            {"gpu_memory_gib": 1e-4},
            {"model_type": "deepseek_v3", "kv_lora_rank": 64, "qk_rope_head_dim": 32},
            "keeps latent",
        ),
        ({"apply_rotation": True, "inference_precision": "auto"}, {}, "writes beyond its memory"),
        ({"apply_rotation": True, "kv_cache_dtype": "u8"}, {}, "does not rotate keys that it keeps in u8"),
        ({"engine_version": "2025.3"}, {}, "outside >=2026.4"),
    ],
)
def test_what_openvino_cannot_honour_is_refused(parameters: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    config = {**Checkpoint(MODEL).config, **changes}
    engine = OpenVINOGenAI(**{**SMALL, **parameters})
    with pytest.raises(OrchestratorError) as caught:
        engine.preflight()
        engine.plan(ModelShape.from_config(config), 1 << 20)
    assert said in str(caught.value)
    assert isinstance(caught.value, UnsupportedPolicyError if "window" in said else SpecError)


@pytest.mark.parametrize("wrong", [{"sink_tokens": 4}, {"recent_tokens": 100}, {"block_size": 16}, {"heavy_tokens": 8}])
def test_sizes_are_whole_blocks(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"multiple of 32|greater than or equal to 32|Input should be 32"):
        OpenVINOGenAI(**wrong)
