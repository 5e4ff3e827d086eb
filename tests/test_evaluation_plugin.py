"""The evaluators `perplexity`, `fidelity` and `footprint`, against float64 references on a tiny model.

Shape legend: N = windows, T = tokens of a window, V = vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.api import Checkpoint, Context, StepError
from orchestrator_evaluation import footprint_probe, forward, register_methods
from orchestrator_evaluation.fidelity import Fidelity, kl_divergence
from orchestrator_evaluation.footprint import Footprint
from orchestrator_evaluation.perplexity import Perplexity
from tests.tiny import make_model

LENGTH = 24


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_model(tmp_path_factory.mktemp("dense"), layers=2))


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory, dense: Checkpoint) -> Checkpoint:
    """The dense model with the smaller half of its block weights set to zero."""
    folder = tmp_path_factory.mktemp("candidate")
    shutil.copytree(dense.path, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = torch.where(weight.abs() > weight.abs().float().median(), weight, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("".join(f"seven wizards judge {number}\n" for number in range(40)))
    return str(path)


@pytest.fixture
def context(dense: Checkpoint, tmp_path: Path) -> Context:
    return Context(seed=0, dense=dense, calibration=None, scratch=tmp_path)


def windows(checkpoint: Checkpoint, source: str) -> torch.Tensor:
    """All windows [N, T] of the text, cut by hand."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    ids = tokenizer(Path(source).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def log_probabilities(checkpoint: Checkpoint, tokens_NT: torch.Tensor) -> torch.Tensor:
    """ln p [N, T, V], computed from end to end in float64."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=tokens_NT).logits.log_softmax(-1)


def test_the_family_registers_its_methods() -> None:
    assert {Perplexity, Fidelity, Footprint} <= set(register_methods())


def test_perplexity_agrees_with_a_float64_reference(
    dense: Checkpoint, candidate: Checkpoint, source: str, context: Context
) -> None:
    tokens_NT = windows(dense, source)
    expected = []
    for checkpoint in (candidate, dense):
        log_p_NTV = log_probabilities(checkpoint, tokens_NT)[:, :-1]
        expected.append(math.exp(-float(log_p_NTV.gather(-1, tokens_NT[:, 1:, None]).mean())))
    metrics = Perplexity(source=source, length_tokens=LENGTH, batch=3).measure(candidate, dense, context).metrics
    assert set(metrics) == set(Perplexity.metrics)
    assert metrics["perplexity_tokens"] == len(tokens_NT) * (LENGTH - 1)
    assert metrics["perplexity"] == pytest.approx(expected[0], rel=1e-4)
    assert metrics["dense_perplexity"] == pytest.approx(expected[1], rel=1e-4)
    assert metrics["perplexity_ratio"] == pytest.approx(expected[0] / expected[1], rel=1e-4)
    assert abs(metrics["perplexity_ratio"] - 1) > 0.01  # the two models do differ


def test_fidelity_agrees_with_a_float64_reference(
    dense: Checkpoint, candidate: Checkpoint, source: str, context: Context
) -> None:
    tokens_NT = windows(dense, source)
    log_p_NTV, log_q_NTV = (log_probabilities(checkpoint, tokens_NT) for checkpoint in (dense, candidate))
    kl = (log_p_NTV.exp() * (log_p_NTV - log_q_NTV)).sum(-1).flatten().sort().values
    agreement = (log_p_NTV.argmax(-1) == log_q_NTV.argmax(-1)).double().mean()
    metrics = Fidelity(source=source, length_tokens=LENGTH, batch=5).measure(candidate, dense, context).metrics
    assert set(metrics) == set(Fidelity.metrics)
    assert metrics["fidelity_tokens"] == tokens_NT.numel()
    assert metrics["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert metrics["kl_p99"] == pytest.approx(float(kl[math.ceil(0.99 * len(kl)) - 1]), rel=1e-3)
    assert metrics["top1_agreement"] == pytest.approx(float(agreement), abs=2 / tokens_NT.numel())
    assert 0.0 < metrics["top1_agreement"] < 1.0


def test_a_model_compared_with_itself_is_exactly_faithful(dense: Checkpoint, source: str, context: Context) -> None:
    metrics = Fidelity(source=source, length_tokens=LENGTH).measure(dense, dense, context).metrics
    assert (metrics["kl_mean"], metrics["kl_p99"], metrics["top1_agreement"]) == (0.0, 0.0, 1.0)
    itself = Perplexity(source=source, length_tokens=LENGTH).measure(dense, dense, context)
    assert itself.metrics["perplexity_ratio"] == 1.0


def test_divergence_of_far_apart_logits_is_finite_and_right() -> None:
    reference = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]])
    other = torch.tensor([[-1000.0, 0.0, 1000.0], [0.0, 0.0, math.log(2)]])
    expected = [2000.0, math.log(4 / 3) + 0.0]  # the second: sum of p ln(p/q) with q = 1/4, 1/4, 1/2
    expected[1] = (2 * math.log(4 / 3) + math.log(2 / 3)) / 3
    assert kl_divergence(reference, other).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", [Perplexity, Fidelity])
def test_neither_batch_nor_chunk_changes_the_result(
    method: Any,
    dense: Checkpoint,
    candidate: Checkpoint,
    source: str,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = method(source=source, length_tokens=LENGTH, windows=6, batch=6).measure(candidate, dense, context).metrics
    monkeypatch.setattr(forward, "_CHUNK_ELEMENTS", 5 * 256)
    parts = method(source=source, length_tokens=LENGTH, windows=6, batch=1).measure(candidate, dense, context).metrics
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4)


def test_chunks_cover_all_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CHUNK_ELEMENTS", 1000)
    for tokens, vocabulary in ((7, 300), (9, 300), (4, 5000), (0, 10)):
        covered = [position for part in forward.chunks(tokens, vocabulary) for position in range(tokens)[part]]
        assert covered == list(range(tokens))


@pytest.mark.parametrize("method", [Perplexity, Fidelity])
def test_too_little_text_is_a_step_error(method: Any, dense: Checkpoint, source: str, context: Context) -> None:
    with pytest.raises(StepError, match="need"):
        method(source=source, length_tokens=LENGTH, windows=100_000).measure(dense, dense, context)


@pytest.mark.parametrize("method", [Perplexity, Fidelity])
def test_a_broken_model_is_a_step_error_and_not_a_number(
    method: Any, dense: Checkpoint, source: str, context: Context, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(dense.path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match="broken"):
        method(source=source, length_tokens=LENGTH, windows=2).measure(Checkpoint(folder), dense, context)


def test_a_token_that_the_model_does_not_know_is_a_step_error(dense: Checkpoint) -> None:
    with pytest.raises(StepError, match="makes token 256, but the model embeds only 256"):
        forward.logits_of(dense.load(), torch.tensor([[1, 256]]))


def test_the_footprint_of_two_models(dense: Checkpoint, candidate: Checkpoint, context: Context) -> None:
    seen: list[float] = []
    watched = Context(0, context.dense, None, context.scratch, lambda fraction, message: seen.append(fraction))
    metrics = Footprint(new_tokens=4, repeats=1, threads=1).measure(candidate, dense, watched)
    assert set(metrics) == set(Footprint.metrics)
    spread = {name: value for name, value in metrics.items() if "_spread" in name}
    assert spread and set(spread.values()) == {0}  # of one round
    assert all(math.isfinite(value) and value > 0 for name, value in metrics.items() if name not in spread)
    files = [path for path in candidate.path.iterdir() if path.is_file()]
    assert metrics["bytes_on_disk"] == sum(path.stat().st_size for path in files)
    assert metrics["weight_bytes"] == (candidate.path / "model.safetensors").stat().st_size
    assert metrics["bytes_on_disk_ratio"] == metrics["bytes_on_disk"] / metrics["dense_bytes_on_disk"]
    assert metrics["peak_memory_bytes"] > 50e6  # a process that holds PyTorch
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_batches_have_speed_first_token_and_memory_of_their_own(
    dense: Checkpoint, candidate: Checkpoint, context: Context
) -> None:
    method = Footprint(new_tokens=4, repeats=1, threads=1, batches=(1, 3))
    metrics = method.measure(candidate, dense, context)
    assert set(metrics) == set(method.declared()) > set(Footprint.metrics)
    for name in ("tokens_per_second", "first_token_seconds", "peak_memory_bytes"):
        for batch in (1, 3):
            ratio = metrics[f"{name}.batch-{batch}"] / metrics[f"dense_{name}.batch-{batch}"]
            assert metrics[f"{name}_ratio.batch-{batch}"] == pytest.approx(ratio)
    assert metrics["peak_memory_bytes.batch-3"] >= metrics["peak_memory_bytes.batch-1"] > 50e6
    assert metrics["peak_memory_bytes"] >= metrics["peak_memory_bytes.batch-3"]


def test_a_model_that_stock_transformers_cannot_load_is_a_step_error(
    dense: Checkpoint, context: Context, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dense.path, folder)
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken!!")
    with pytest.raises(StepError, match=r"could not load and run .*exit code 1"):
        Footprint(new_tokens=1, repeats=1).measure(Checkpoint(folder), dense, context)


def test_a_probe_that_takes_too_long_is_ended(dense: Checkpoint, context: Context) -> None:
    with pytest.raises(StepError, match="took too long"):
        Footprint(timeout_seconds=0.05).measure(dense, dense, context)


def test_the_probe_runs_without_this_project(dense: Checkpoint) -> None:
    probe = str(Path(str(footprint_probe.__file__)).absolute())
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print([name for name in sys.modules if name.startswith('orchestrator')])"
    )
    command = [sys.executable, "-P", "-c", code, probe, str(dense.path), "--new-tokens", "2"]
    done = subprocess.run(command, input="decode\ndecode\n", capture_output=True, text=True, check=True)
    *answers, modules = done.stdout.splitlines()
    names = [next(iter(json.loads(answer))) for answer in answers]
    assert names == ["load_seconds", "tokens_per_second", "tokens_per_second", "peak_memory_bytes"]
    assert modules == "[]"
