"""llama.cpp's server is started by the script of a release, and what it allocates is what the plan says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.api import Checkpoint, Context, KVPlan, ModelShape, OrchestratorError, SpecError
from orchestrator.bundle import write_bundle
from orchestrator.deployment import serving_files
from orchestrator.formats import write_formats
from orchestrator.serving_engine import UnsupportedPolicyError
from orchestrator_export.gguf import GGUF
from orchestrator_quantization.rtn import RTN
from orchestrator_serving.llama_cpp import LlamaCpp
from tests import tiny
from tests.llama_server import parsed
from tests.test_gguf import CARRIED, compressed, whole_tokenizer
from tests.tiny import make_model

MODEL = Path(orchestrator.__file__).parent / "quickstart" / "model"
PROMPTS = ("def read_text(path):\n", "class Reader:\n", "import os\n", "    return [name for name in")
SMALL: dict[str, Any] = {"gpu_memory_gib": 0.03, "activation_gib": 0.0, "max_model_len": 300}
_CELLS = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers, +(\d+)/(\d+) seqs\), K \((\w+)\): +[\d.]+ MiB, V \((\w+)\)"
)


@dataclass(frozen=True)
class Running:
    """A started server. cells: of the log, (MiB, cells, layers, sequences, rows, types of K and V) of each."""

    address: str
    log: Path

    @property
    def cells(self) -> list[tuple[str, ...]]:
        return _CELLS.findall(self.log.read_text(errors="replace"))

    def complete(self, prompt: str, **entries: Any) -> Any:
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_tokens": True, **entries}
        request = urllib.request.Request(
            f"{self.address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model in 4 bits as a release with a GGUF file, served from what is left of 30 MiB."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    model = compressed(Checkpoint(MODEL), RTN(num_bits=4, group_size=32), folder / "model")
    (folder / "release").mkdir()
    write_bundle(model, [LlamaCpp(**SMALL)], folder / "release")
    context = Context(0, model, None, folder / "scratch")
    write_formats([GGUF(type="f16", tokens=64)], model, folder / "release", {}, context)
    return folder / "release"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `llama-server` on the path."""
    path = tmp_path / "bin" / "llama-server"
    path.parent.mkdir()
    root = Path(__file__).parent.parent
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec {sys.executable} -m tests.llama_server "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


@contextmanager
def started(release: Path) -> Iterator[Running]:
    """Start the script of a release and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = release / "server.log"
    command = ["sh", "serving/llama_cpp/llama-server.sh", "--port", str(port), "-lv", "4", "--threads", "1"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=release, stdout=out, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield Running(address, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def rendered(release: Path, target: Path, engine: LlamaCpp, model: Checkpoint | None = None) -> tuple[Path, KVPlan]:
    """The same release with the files of another engine."""
    model = model or Checkpoint(release)
    engine.preflight()
    shape = ModelShape.from_config(model.config)
    folder = target / "serving" / engine.name
    folder.mkdir(parents=True)
    for name, text in serving_files(engine, shape, model.weight_bytes()).items():
        (folder / name).write_text(text)
    (target / "formats").symlink_to(release / "formats")
    return target, engine.plan(shape, model.weight_bytes())


def shortfalls(model: Any, prompt_T: list[int], made_T: list[int]) -> torch.Tensor:
    """By how much each generated token is less probable than the best one, nats, as Transformers computes it."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt_T + made_T])).logits[0].float()
    log_p_TV = logits_TV[len(prompt_T) - 1 : -1].log_softmax(-1)
    return log_p_TV.amax(-1) - log_p_TV[range(len(made_T)), made_T]


@pytest.mark.usefixtures("program")
def test_a_release_answers_as_transformers_does_in_the_cache_that_was_planned(release: Path) -> None:
    plan = json.loads((release / "serving/llama_cpp/kv-plan.json").read_text())
    model, tokenizer = Checkpoint(release).load(torch.float32), Checkpoint(release).load_tokenizer()
    with started(release) as server:
        ((size, cells, layers, sequences, rows, *kinds),) = server.cells
        assert (int(cells), int(layers), kinds) == (plan["block_size"], 6, ["f16", "f16"])
        slots = min(4, int(plan["max_concurrency"]))
        assert int(sequences) == int(rows) == slots == 4
        assert float(size) == pytest.approx(slots * plan["bytes_per_block"] / 2**20, abs=0.005)
        # The slots work at the same time, and none sees what another one does.
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, n_predict=60), PROMPTS))
        assert len({answer["id_slot"] for answer in answers}) == 4
        # What a prompt has in common with the one before it in its slot is not computed again.
        again = server.complete(PROMPTS[0], n_predict=4, id_slot=answers[0]["id_slot"])
        assert again["timings"]["cache_n"] == len(tokenizer(PROMPTS[0])["input_ids"]) - 1
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        short_T = shortfalls(model, tokenizer(prompt)["input_ids"], answer["tokens"])
        assert len(short_T) == 60 and float(short_T.max()) < 0.02
        assert answer["content"] == tokenizer.decode(answer["tokens"])


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_every_element_type_takes_what_was_planned(release: Path, tmp_path: Path, kind: str) -> None:
    engine = LlamaCpp(**SMALL | {"kv_cache_dtype": kind, "max_num_seqs": 7, "max_model_len": 512})
    folder, plan = rendered(release, tmp_path / "release", engine)
    with started(folder) as server:
        ((size, cells, _, sequences, rows, key, value),) = server.cells
        assert key == value == {"float32": "f32", "bfloat16": "bf16"}.get(kind, kind)
        assert (int(cells), int(sequences), int(rows)) == (512, 7, 7)
        assert float(size) == pytest.approx(7 * plan.bytes_per_block / 2**20, abs=0.005)
        assert server.complete(PROMPTS[0], n_predict=8)["tokens_predicted"] == 8


@pytest.mark.usefixtures("program")
def test_first_and_recent_tokens_stay_however_long_the_text_becomes(release: Path, tmp_path: Path) -> None:
    engine = LlamaCpp(**SMALL | {"policy": "streaming_llm", "sink_tokens": 4, "recent_tokens": 100, "max_num_seqs": 1})
    folder, plan = rendered(release, tmp_path / "release", engine)
    with started(folder) as server:
        ((_, cells, *_),) = server.cells
        assert int(cells) == plan.block_size == 256
        answer = server.complete(PROMPTS[0], n_predict=1000)
        assert answer["tokens_predicted"] == 1000 and answer["truncated"]
        shifts = re.findall(r"n_keep = (\d+), n_left = (\d+), n_discard = (\d+)", server.log.read_text())
    assert len(shifts) > 5
    before = {int(keep) + int(left) for keep, left, _ in shifts}
    after = {int(keep) + int(left) - int(discarded) for keep, left, discarded in shifts}
    assert (before, after, plan.held_tokens) == ({255}, {130}, 256)
    assert "between 130 and 255 tokens are kept" in (folder / "serving/llama_cpp/README.md").read_text()
    for keep, left, discarded in shifts:
        assert int(keep) == 4 and int(left) - int(discarded) >= 100


@pytest.mark.usefixtures("program")
def test_without_a_policy_a_full_slot_ends_the_text(release: Path, tmp_path: Path) -> None:
    folder, plan = rendered(
        release, tmp_path / "release", LlamaCpp(**SMALL | {"max_num_seqs": 1, "max_model_len": 256})
    )
    with started(folder) as server:
        answer = server.complete(PROMPTS[0], n_predict=1000)
    assert answer["tokens_predicted"] + answer["tokens_evaluated"] in (plan.block_size, plan.block_size + 1)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("policy", ["paged", "window"])
def test_layers_with_a_window_have_cells_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setattr(tiny, "VOCABULARY", 384)
    own = tiny._OWN_ENTRIES["gemma2"]
    changed = {**CARRIED["gemma2"], "sliding_window": 64, "max_position_embeddings": 2048}
    monkeypatch.setitem(tiny._OWN_ENTRIES, "gemma2", lambda width, inner: {**own(width, inner), **changed})
    model = Checkpoint(make_model(tmp_path / "model", "gemma2", dtype=torch.float32, tokenizer=False))
    whole_tokenizer(model.path)
    write_formats([GGUF(type="f16", tokens=16)], model, tmp_path / "files", {}, Context(0, model, None, tmp_path / "s"))
    engine = LlamaCpp(
        gpu_memory_gib=0.1, activation_gib=0.0, max_model_len=2048, ubatch_size=128, max_num_seqs=3,
        **({} if policy == "paged" else {"policy": policy, "recent_tokens": 500}),
    )  # fmt: skip
    folder, plan = rendered(tmp_path / "files", tmp_path / "release", engine, model)
    with started(folder) as server:
        found = server.cells
        log = server.log.read_text()
    full = 2048 if policy == "paged" else 1024
    assert [(int(cells), int(layers), int(rows)) for _, cells, layers, _, rows, *_ in found] == [
        (full, 1, 3), (256 if policy == "paged" else full, 2, 3)
    ]  # fmt: skip
    assert sum(float(size) for size, *_ in found) == pytest.approx(3 * plan.bytes_per_block / 2**20, abs=0.01)
    assert "ctx_shift is not supported" not in log


# Without a server.


def shape_of(**changes: Any) -> ModelShape:
    config = json.loads((MODEL / "config.json").read_text())
    return ModelShape.from_config({**config, **changes})


def test_llama_cpps_own_parser_reads_every_option() -> None:
    engine = LlamaCpp(
        **SMALL | {"policy": "streaming_llm", "recent_tokens": 100, "kv_cache_dtype": "q4_0"},
        sink_tokens=8, cache_reuse=32, prompt_cache_mib=64, ubatch_size=4096,
    )  # fmt: skip
    shape = shape_of()
    params = parsed(["--model", "some.gguf", *engine.arguments(shape, engine.plan(shape, 1 << 20))])
    assert params is not None
    assert (params.n_ctx, params.n_parallel, params.kv_unified) == (1024, 4, False)
    assert (params.n_keep, params.ctx_shift, params.n_cache_reuse, params.cache_ram_mib) == (8, True, 32, 64)
    assert (params.n_batch, params.n_ubatch, params.fit_params) == (4096, 4096, False)
    assert params.cache_type_k == params.cache_type_v == 2  # GGML_TYPE_Q4_0
    assert parsed(["--model", "some.gguf", "--kv-evict-sink", "4"]) is None


@pytest.mark.parametrize(
    ("parameters", "changes", "said"),
    [
        ({"tensor_parallel_size": 2}, {}, "on one device"),
        ({"kv_cache_dtype": "q8_0"}, {"head_dim": 24}, "do not divide heads of 24"),
        ({"policy": "streaming_llm", "recent_tokens": 255}, {}, "set recent_tokens to at most 253"),
        ({}, {"model_type": "mistral", "sliding_window": 64}, "ignores the sliding window of 64 tokens"),
        (
            {"policy": "streaming_llm", "recent_tokens": 255, "gpu_memory_gib": 1e-4},
            {"model_type": "mistral", "sliding_window": 64},
            "ignores the sliding window of 64 tokens",
        ),
        (
            {"gpu_memory_gib": 1e-4},
            {"model_type": "deepseek_v3", "kv_lora_rank": 64, "qk_rope_head_dim": 32},
            "keeps latent",
        ),
        ({"policy": "h2o", "recent_tokens": 8}, {}, "policy 'h2o'"),
        ({"engine_version": "4000"}, {}, "outside >=11000"),
    ],
)
def test_what_llama_cpp_cannot_honour_is_refused(
    parameters: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    engine = LlamaCpp(**SMALL | parameters)
    with pytest.raises(OrchestratorError) as caught:
        engine.preflight()
        engine.plan(shape_of(**changes), 1 << 20)
    assert said in str(caught.value)
    assert isinstance(caught.value, UnsupportedPolicyError if "h2o" in said else SpecError)


def test_a_release_without_a_gguf_file_says_so(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release / "serving", tmp_path / "serving")
    done = subprocess.run(["sh", "serving/llama_cpp/llama-server.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "formats: [{gguf: {}}]" in done.stderr
