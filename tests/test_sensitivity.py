"""The Fisher information of layers' outputs: against autograd through the whole stock model, and against real KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from orchestrator.checkpoint import Checkpoint
from orchestrator.sensitivity import output_sensitivity
from tests.tiny import make_model, make_tokens


def by_autograd(checkpoint: Checkpoint, tokens_NT: torch.Tensor, seed: int) -> dict[str, float]:
    """The same numbers from one backward pass through the whole model, in float64, for the same drawn tokens."""
    names = {layer.name for layer in checkpoint.block_layers()}
    single = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    with torch.no_grad():
        chances = single(tokens_NT).logits.flatten(0, 1).softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed * 1_000_003))[:, 0]
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    sums: dict[str, float] = {}

    def watch(name: str, output: torch.Tensor) -> None:
        output.register_hook(lambda g: sums.__setitem__(name, float(g.square().mean(-1).sum())))  # type: ignore[no-untyped-call]

    for name, module in model.named_modules():
        stored = name if name in names else name.removeprefix(f"{model.base_model_prefix}.")
        if isinstance(module, nn.Linear | Conv1D) and stored in names:
            module.register_forward_hook(lambda m, inputs, output, n=stored: watch(n, output))
    cross_entropy(model(tokens_NT).logits.flatten(0, 1), drawn, reduction="sum").backward()
    return {name: total / (2 * tokens_NT.numel()) for name, total in sums.items()}


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        ("llama", False),
        ("llama", True),
        ("qwen3", False),
        ("gemma2", True),
        ("phi3", False),
        ("gpt2", True),
        ("opt", True),
        ("gpt_neox", False),
    ],
)
def test_gradients_taken_block_by_block_are_those_of_the_whole_model(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture, dtype=torch.float32, tied=tied))
    tokens_NT = make_tokens(12)  # more in all than the 128 positions of OPT
    found = output_sensitivity(checkpoint, tokens_NT, tmp_path / "scratch", seed=3)
    expected = by_autograd(checkpoint, tokens_NT, seed=3)
    assert found.keys() == {layer.name for layer in checkpoint.block_layers()} == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert not [path for path in (tmp_path / "scratch").iterdir() if "gradient" in path.name]


def test_threads_do_not_change_a_bit_and_the_seed_does(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    tokens_NT = make_tokens(100, 32)
    runs = [
        output_sensitivity(checkpoint, tokens_NT, tmp_path / str(workers), seed=0, workers=workers)
        for workers in (1, 3)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != output_sensitivity(checkpoint, tokens_NT, tmp_path / "seed", seed=1)


def test_experts_that_saw_no_token_cost_nothing(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", "mixtral"))
    few = output_sensitivity(checkpoint, make_tokens(1, 2), tmp_path / "few", seed=0)
    many = output_sensitivity(checkpoint, make_tokens(20), tmp_path / "many", seed=0)
    assert few.keys() == many.keys() == {layer.name for layer in checkpoint.block_layers()}
    assert any(value == 0 for name, value in few.items() if ".experts." in name)
    assert all(value > 0 for name, value in few.items() if ".experts." not in name)
    assert all(value > 0 for value in many.values())


def test_the_estimate_is_the_divergence_that_a_small_change_makes(tmp_path: Path) -> None:
    """The factors are taken as unrelated, so not exactly: within a half for every layer of a tiny model."""
    checkpoint = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32))
    tokens_NT = make_tokens(300)
    costs = output_sensitivity(checkpoint, tokens_NT, tmp_path / "scratch", seed=0)
    model: Any = checkpoint.load(torch.float64)
    with torch.no_grad():
        before = model(tokens_NT).logits.log_softmax(-1)
        for name, cost in costs.items():
            layer = model.get_submodule(name)
            inputs: list[torch.Tensor] = []
            hook = layer.register_forward_pre_hook(lambda m, args, seen=inputs: seen.append(args[0].flatten(0, 1)))
            model(tokens_NT)
            hook.remove()
            weight, draw = layer.weight.clone(), torch.Generator().manual_seed(1)
            change = 0.01 * weight.std() * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
            layer.weight += change
            after = model(tokens_NT).logits.log_softmax(-1)
            layer.weight.copy_(weight)
            divergence = float((before.exp() * (before - after)).sum(-1).mean())
            estimate = cost * float((inputs[0] @ change.T).square().sum(-1).mean())
            assert 0.5 < estimate / divergence < 2, (name, estimate, divergence)
