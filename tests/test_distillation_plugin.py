"""The distillation methods: what training keeps and restores, whatever teaches it.

The losses are in `test_distillation_losses`, what teaches in `test_distillation_training`, models on grids in
`test_distillation_grids`.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from orchestrator.api import CalibrationSet, Checkpoint, Context, StepError
from orchestrator.errors import OrchestratorError
from orchestrator_distillation import register_methods
from orchestrator_distillation.lesson import Order, rate
from orchestrator_distillation.presets import GKD, QAD, QAT, DistiLLM, Logits, MiniLLM
from orchestrator_distillation.zeros import ZeroMask
from tests.tiny import make_model, make_tokens


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_model(tmp_path_factory.mktemp("dense"), layers=2, tied=request.param))


@pytest.fixture
def context(dense: Checkpoint, tmp_path: Path) -> Context:
    calibration = CalibrationSet(make_tokens(sequences=24, length=20), {})
    return Context(seed=0, dense=dense, calibration=calibration, scratch=tmp_path)


def block_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if name.endswith("proj.weight")}


def pruned(dense: Checkpoint) -> PreTrainedModel:
    """The dense model with the smaller half of its block weights set to zero."""
    model = dense.load()
    for weight in block_weights(model).values():
        weight.data[weight.abs() <= weight.abs().float().median()] = 0
    return model


SMALL: dict[str, Any] = {"updates": 12, "batch_sequences": 4, "length_tokens": 20, "learning_rate": 2e-3}


def method(**changes: Any) -> Logits:
    return Logits(**{**SMALL, **changes})


def test_the_family_registers_its_presets() -> None:
    assert register_methods() == [Logits, GKD, DistiLLM, MiniLLM, QAT, QAD]


def test_a_pruned_model_nears_the_dense_one_and_keeps_every_zero(dense: Checkpoint, context: Context) -> None:
    model = pruned(dense)
    before = {name: weight.detach().clone() for name, weight in block_weights(model).items()}
    result = method(updates=40).apply(model, context)
    metrics = result.metrics
    # The tied tiny model has wild logits (its embeddings have a spread of 1), and learns more slowly.
    assert metrics["kl_after"] < (0.95 if dense.config["tie_word_embeddings"] else 0.8) * metrics["kl_before"]
    assert metrics["last_loss"] < metrics["first_loss"]
    assert metrics["updates"] == 40
    assert metrics["tokens"] == 40 * 4 * 20
    assert metrics["zeros_kept"] == sum(int((weight == 0).sum()) for weight in before.values())
    for name, weight in block_weights(result.model).items():
        assert not bool(weight[before[name] == 0].any())
        assert not torch.equal(weight, before[name])
    assert all(bool(parameter.isfinite().all()) for parameter in result.model.parameters())


def test_ties_dtypes_modes_and_global_state_are_as_before(dense: Checkpoint, context: Context) -> None:
    model = pruned(dense)
    model.train()
    model.model.layers[0].eval()
    frozen = next(iter(block_weights(model).values()))
    frozen.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    buffers = {name: (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    state = torch.get_rng_state()
    with torch.no_grad():  # training must not depend on the caller's mode, nor change it
        result = method().apply(model, context)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in result.model.modules()] == modes
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert not frozen.requires_grad
    assert (result.model.lm_head.weight is result.model.model.embed_tokens.weight) == tied
    assert tied == dense.config["tie_word_embeddings"]
    for name, buffer in result.model.named_buffers():
        assert buffer.dtype == buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_the_same_input_gives_the_same_bytes_whatever_the_global_seed(dense: Checkpoint, context: Context) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(method().apply(pruned(dense), context).model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = Context(7, context.dense, context.calibration, context.scratch)
    assert not torch.equal(method().apply(pruned(dense), other).model.model.norm.weight, states[0]["model.norm.weight"])


def test_the_dense_model_itself_stays_where_it_is(dense: Checkpoint, context: Context) -> None:
    metrics = method(updates=3).apply(dense.load(), context).metrics
    assert metrics["kl_before"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["first_loss"] == pytest.approx(0.0, abs=1e-9)


def test_text_can_be_the_source_and_progress_is_reported(dense: Checkpoint, context: Context, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("seven wizards judge\n" * 400)
    seen: list[tuple[float, str]] = []
    watched = Context(0, dense, None, tmp_path, lambda fraction, message: seen.append((fraction, message)))
    chosen = method(source=str(tmp_path / "text.txt"), sequences=16, updates=4)
    assert not chosen.needs_calibration()
    assert method().needs_calibration()
    metrics = chosen.apply(pruned(dense), watched).metrics
    assert metrics["kl_after"] < metrics["kl_before"]
    assert [fraction for fraction, _ in seen] == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(StepError, match="need"):
        method(source=str(tmp_path / "text.txt"), sequences=100_000).apply(pruned(dense), watched)


def test_long_calibration_windows_are_cut_into_several(context: Context) -> None:
    windows_NT = method(length_tokens=9)._windows(context)
    assert context.calibration is not None
    assert windows_NT.shape == (48, 9)
    assert torch.equal(windows_NT[:2].flatten(), context.calibration.tokens_NT[0, :18])


def test_without_windows_there_is_a_step_error(dense: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no calibration set"):
        method().apply(pruned(dense), Context(0, dense, None, tmp_path))
    one = Context(0, dense, CalibrationSet(make_tokens(sequences=1, length=20), {}), tmp_path)
    with pytest.raises(StepError, match="two windows"):
        method().apply(pruned(dense), one)


def test_a_model_that_is_broken_from_the_start_is_said_to_be(dense: Checkpoint, context: Context) -> None:
    model = pruned(dense)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(StepError, match="the loss on held-out windows is nan after 0 updates") as caught:
        method().apply(model, context)
    assert "not finite" in str(caught.value.problems[0].remedy)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_diverging_loss_is_a_step_error_that_says_what_to_do(dense: Checkpoint, tmp_path: Path) -> None:
    model = pruned(dense)

    def spoil(fraction: float, message: str) -> None:
        if message.startswith("update 2 of"):
            model.model.norm.weight.data[0] = float("nan")

    calibration = CalibrationSet(make_tokens(sequences=24, length=20), {})
    with pytest.raises(StepError, match="diverged at update 3: loss nan") as caught:
        method(examine_every=12).apply(model, Context(0, dense, calibration, tmp_path, spoil))
    assert "learning_rate" in str(caught.value.problems[0].remedy)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_another_vocabulary_is_refused(context: Context, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(OrchestratorError, match="the student scores 300 tokens, the teacher 256"):
        method().apply(model, context)


def test_a_lost_zero_is_noticed() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]])
    zeros = ZeroMask(torch.nn.Sequential(layer))
    assert (zeros.count, zeros.violations()) == (2, [])
    layer.weight.data += 1
    assert zeros.violations() == ["0.weight"]
    zeros.clear_weights()
    assert layer.weight.tolist() == [[0.0, 2.0, 3.0], [4.0, 0.0, 5.0]]


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [rate(update, 100, 0.1) for update in range(100)]
    assert rates[:10] == pytest.approx([(update + 1) / 10 for update in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert rate(0, 1, 0.9) == 1.0


def test_every_window_is_used_once_per_pass() -> None:
    order = Order(8, 4, 0)
    passes = [torch.cat([order.next(), order.next()]) for _ in range(3)]
    assert all(sorted(windows.tolist()) == list(range(8)) for windows in passes)
    order.go_to(2)
    assert torch.equal(torch.cat([order.next(), order.next()]), passes[1])
    assert Order(3, 4, 0).next().sort().values.tolist() == [0, 1, 2]
