"""Structured pruning computes in float32 with a model that stays in its own dtype, and never has all gradients.

Shape legend: N = windows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.api import CalibrationSet, Checkpoint, Context, ModelMethod
from orchestrator.facts import facts_of
from orchestrator_pruning import block_gradients as gradients_module
from orchestrator_pruning import precision
from orchestrator_pruning.block_gradients import block_gradients
from orchestrator_pruning.decoder import DecoderLayers
from orchestrator_pruning.dependency_groups import blocks_of
from orchestrator_pruning.depth import Depth
from orchestrator_pruning.llm_pruner import LLMPruner
from orchestrator_pruning.precision import in_float32, widened
from tests.tiny import ARCHITECTURES, OTHER_ARCHITECTURES, make_model, make_tokens

LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHER_ARCHITECTURES])
def test_the_numbers_are_those_of_the_model_in_float32(architecture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, architecture, tokenizer=False))
    narrow, wide, tokens_NT = checkpoint.load(), checkpoint.load(torch.float32), make_tokens(3, 12)
    before = {name: tensor.clone() for name, tensor in narrow.state_dict().items()}
    with torch.no_grad(), in_float32(narrow):
        assert all(parameter.dtype == torch.bfloat16 for parameter in matrices(narrow).values())
        ours_NTV = narrow(input_ids=tokens_NT, use_cache=False).logits
    expected_NTV = wide(input_ids=tokens_NT, use_cache=False).logits
    assert ours_NTV.dtype == torch.float32
    torch.testing.assert_close(ours_NTV, expected_NTV, rtol=0, atol=0)
    after = narrow.state_dict()
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert not any("forward" in vars(module) or module._forward_hooks for module in narrow.modules())


def test_gradients_pass_through_as_in_float32(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, "qwen2", tokenizer=False))
    found = []
    for model in (checkpoint.load(), checkpoint.load(torch.float32)):
        model.requires_grad_(False)
        hidden = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with in_float32(model):
            logits = model(inputs_embeds=hidden, use_cache=False).logits
            found.append(torch.autograd.grad(logits.square().sum(), hidden)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "method",
    [
        LLMPruner(ratio=0.5, lora_rank=0, length_tokens=16),
        LLMPruner(ratio=0.5, lora_rank=2, lora_updates=3, length_tokens=16),
        Depth(layers=1, criterion="greedy"),
    ],
    ids=["taylor", "recovered", "greedy"],
)
def test_no_matrix_is_held_wide_and_the_result_is_as_good(
    method: ModelMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", tokenizer=False))
    calibration = CalibrationSet(make_tokens(8, 16), {})
    wide_at_once: list[int] = []
    before = precision.widened

    def watched(module: Any) -> Any:
        wide_at_once.append(sum(parameter.numel() for parameter in matrices(module).values()))
        return before(module)

    monkeypatch.setattr(gradients_module, "widened", watched)
    metrics: list[dict[str, float]] = []
    held: list[set[torch.dtype]] = []
    half = 0
    for model in (checkpoint.load(), checkpoint.load(torch.float32)):

        def progress(fraction: float, message: str, model: Any = model) -> None:
            held.append({p.dtype for n, p in matrices(model).items() if "lora" not in n})

        result = method.apply(model, Context(0, checkpoint, calibration, tmp_path, progress))
        metrics.append(dict(result.metrics))
        half = half or len(held)
    assert held[:half] and all(dtypes == {torch.bfloat16} for dtypes in held[:half])
    block = max(facts.parameters for facts in facts_of(checkpoint).blocks)
    assert all(count <= block for count in wide_at_once)
    for name, value in metrics[0].items():
        close = 2e-2 if "recovered" in name else 1e-6  # merged updates are rounded to the dtype of the checkpoint
        assert value == pytest.approx(metrics[1][name], rel=close), name


def test_gradients_of_one_block_are_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by size: whatever is as large as a layer's weight and no parameter."""
    model = Checkpoint(make_model(tmp_path, layers=6, dtype=torch.float32, tokenizer=False)).load()
    model.requires_grad_(False)
    blocks = blocks_of(model)
    shapes = {tuple(blocks["model.layers.0"].get_submodule(layer).weight.shape) for layer in LAYERS}
    of_block = sum(blocks["model.layers.0"].get_submodule(layer).weight.numel() for layer in LAYERS)
    own = {id(parameter) for parameter in model.parameters()} | {p.data_ptr() for p in model.parameters()}

    def alive() -> int:
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return sum(
            t.numel() for t in found if tuple(t.shape) in shapes and t.data_ptr() not in own and id(t) not in own
        )

    started = alive()
    during: list[int] = []
    taken = torch.autograd.grad

    def counted(*arguments: Any, **named: Any) -> Any:
        gradients = taken(*arguments, **named)
        during.append(alive() - started)
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", counted)
    seen = []
    for name, gradients in block_gradients(model, blocks, LAYERS, make_tokens(2, 8), tmp_path, squares=True):
        seen.append(name)
        assert set(gradients) == set(LAYERS)
        del gradients
    assert seen == list(reversed(blocks))
    # Of a block the mean, the mean of squares, and the gradient of a window: never those of six blocks.
    assert 2 * of_block <= max(during) <= 3 * of_block
    assert alive() == started
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_widened_block_gets_back_what_it_had(tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path, tokenizer=False)).load()
    block = DecoderLayers(model)._modules[1]
    places = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    with pytest.raises(KeyError), widened(block):
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}
        raise KeyError
    assert {name: parameter.data_ptr() for name, parameter in block.named_parameters()} == places


def test_the_estimate_counts_the_model_as_it_is_stored(tmp_path: Path) -> None:
    facts = facts_of(Checkpoint(make_model(tmp_path, layers=8, hidden_size=128, intermediate_size=512)))
    for method in (Depth(layers=1), LLMPruner(ratio=0.5, importance="l2", lora_rank=0)):
        needed = method.estimate(facts, facts, (2, 8)).memory_bytes
        assert facts.parameters * 2 < needed < 1.01 * facts.load_bytes(as_float32=False) < facts.widened_bytes
    followed = LLMPruner(ratio=0.5, importance="l2").estimate(facts, facts, (2, 8)).memory_bytes
    alone = LLMPruner(ratio=0.5, importance="l2", lora_objective="text").estimate(facts, facts, (2, 8)).memory_bytes
    assert followed - alone > facts.parameters * facts.item_bytes  # the dense model beside it
