"""LLM-Pruner: groups against lists by hand, gradients and importances against whole-model autograd in float64, the
pruned model against the dense one with the same groups at zero.

Shape legend: N = windows, T = tokens of a window, V = vocabulary, O, I = out and in features, G = groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.api import CalibrationSet, Checkpoint, Context, ModelFacts, PreflightError, StepError
from orchestrator.export import save_model
from orchestrator.facts import facts_of
from orchestrator.home import Settings
from orchestrator.plugins import discover
from orchestrator.run import Execution, run_locally
from orchestrator_pruning import block_gradients as gradients_module
from orchestrator_pruning import llm_pruner as pruner_module
from orchestrator_pruning.block_gradients import block_gradients
from orchestrator_pruning.dependency_groups import PROBES, Call, GroupSet, blocks_of, make_probe, trace
from orchestrator_pruning.importance import Importance
from orchestrator_pruning.llm_pruner import LLMPruner
from tests.test_run import Watcher
from tests.tiny import edit_config, make_model, make_tokens

WIDTH, CHANNELS, HEADS = 64, 128, 4  # of the tiny models
HEAD_DIM = {"llama": 16, "qwen2": 16, "mistral": 16, "qwen3": 32, "gemma2": 32, "phi3": 16}
Groups = list[dict[str, list[int]]]  # for each group, what of each layer belongs to it


def method(**changes: Any) -> LLMPruner:
    return LLMPruner(**{"ratio": 0.5, "lora_rank": 0, "length_tokens": 16, **changes})


def context(folder: Path, dense: Checkpoint, tokens_NT: torch.Tensor | None = None, seed: int = 0) -> Context:
    calibration = None if tokens_NT is None else CalibrationSet(tokens_NT, {})
    return Context(seed=seed, dense=dense, calibration=calibration, scratch=folder)


def traced(model: Any) -> dict[str, tuple[GroupSet, ...]]:
    blocks = blocks_of(model)
    probe = make_probe(model, list(blocks.values()))
    calls = zip(blocks.items(), probe.calls, strict=True)
    return {name: trace(block, name, call, probe.hidden_BTD) for (name, block), call in calls}


def as_lists(groups: GroupSet) -> Groups:
    return [
        {member.layer: sorted(member.index_GK[group].tolist()) for member in groups.members}
        for group in range(groups.count)
    ]


def head_groups(kv_heads: int, size: int) -> Groups:
    """By hand: KV head g, the query heads that share it, and their columns of o."""
    shared = HEADS // kv_heads * size
    return [
        {
            "self_attn.q_proj": list(range(g * shared, (g + 1) * shared)),
            "self_attn.k_proj": list(range(g * size, (g + 1) * size)),
            "self_attn.v_proj": list(range(g * size, (g + 1) * size)),
            "self_attn.o_proj": list(range(g * shared, (g + 1) * shared)),
        }
        for g in range(kv_heads)
    ]


def channel_groups() -> Groups:
    return [{"mlp.gate_proj": [i], "mlp.up_proj": [i], "mlp.down_proj": [i]} for i in range(CHANNELS)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_groups_are_those_that_one_would_list_by_hand(architecture: str, kv_heads: int, tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path, architecture, kv_heads=kv_heads, tokenizer=False)).load(torch.float32)
    found = traced(model)
    assert list(found) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    for attention, mlp in found.values():
        assert as_lists(attention) == head_groups(kv_heads, HEAD_DIM[architecture])
        assert as_lists(mlp) == channel_groups()


def test_fused_layers_come_out_as_groups_of_several_rows_of_one_layer(tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path, "phi3", tokenizer=False)).load(torch.float32)
    attention, mlp = traced(model)["model.layers.0"]
    keys, values = HEADS * 16, (HEADS + 2) * 16  # where k and v begin in qkv_proj
    assert as_lists(attention) == [
        {
            "self_attn.qkv_proj": [
                *range(g * 32, (g + 1) * 32),
                *range(keys + g * 16, keys + (g + 1) * 16),
                *range(values + g * 16, values + (g + 1) * 16),
            ],
            "self_attn.o_proj": list(range(g * 32, (g + 1) * 32)),
        }
        for g in range(2)
    ]
    assert as_lists(mlp) == [{"mlp.gate_up_proj": [i, CHANNELS + i], "mlp.down_proj": [i]} for i in range(CHANNELS)]


def test_no_activation_function_hides_a_tie(tmp_path: Path) -> None:
    """OPT's is a ReLU, which is flat where its input is negative."""
    model = Checkpoint(make_model(tmp_path, "opt", tokenizer=False)).load(torch.float32)
    mlp = traced(model)["model.decoder.layers.1"][1]
    assert as_lists(mlp) == [{"fc1": [i], "fc2": [i]} for i in range(CHANNELS)]


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("gpt2", r"transformer\.h\.0\.attn\.c_attn\.weight"), ("mixtral", r"model\.layers\.0\.mlp\.")],
)
def test_a_layer_in_no_group_is_refused_by_name(architecture: str, layer: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, architecture, tokenizer=False))
    with pytest.raises(StepError, match=f"{layer}.* fits into no group") as caught:
        method(importance="l2").apply(checkpoint.load(), context(tmp_path, checkpoint))
    assert caught.value.problems[0].remedy


class Odd(torch.nn.Module):
    """A block with one layer that is not where a layer should be."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        if form in ("alone", "unused"):
            self.extra = torch.nn.Linear(8, 8)
        if form == "shared":
            self.extra = torch.nn.Linear(12, 8)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.up(hidden_BTD))
        result = self.down(inner)
        result += hidden_BTD  # as Falcon and others do
        if self.form == "alone":
            result = result + self.extra(hidden_BTD)
        elif self.form == "twice":
            result = result + self.up(hidden_BTD).sum()
        elif self.form == "shared":
            result = result + self.extra(inner)
        elif self.form == "leaks":
            result = result + inner[..., :8]
        return result


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("alone", "block.extra fits .* no linear layer reads it"),
        ("twice", "block.up fits .* more than once"),
        ("unused", "block.extra fits .* does not call it"),
        ("shared", "block.up fits .* both down and extra read it"),
        ("leaks", "block.up fits .* goes into the block's output as well"),
    ],
)
def test_odd_blocks_are_refused_with_a_reason(form: str, said: str) -> None:
    with pytest.raises(StepError, match=said):
        trace(Odd(form), "block", Call((), {}), torch.randn(PROBES, 8, 8))


def test_a_block_that_adds_to_an_output_in_place_is_traced() -> None:
    (groups,) = trace(Odd("plain"), "block", Call((), {}), torch.randn(PROBES, 8, 8))
    assert [(member.layer, member.axis, len(member.index_GK)) for member in groups.members] == [
        ("up", 0, 12),
        ("down", 1, 12),
    ]


def windows_of(model: Any, tokens_NT: torch.Tensor, layers: list[str]) -> dict[str, list[torch.Tensor]]:
    """By whole-model autograd: the gradient of each window's loss by each weight."""
    weights = {layer: model.get_submodule(layer).weight for layer in layers}
    found: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for tokens_T in tokens_NT:
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0, :-1]
        gradients = torch.autograd.grad(cross_entropy(logits_TV, tokens_T[1:]), list(weights.values()))
        for layer, gradient_OI in zip(layers, gradients, strict=True):
            found[layer].append(gradient_OI)
    return found


LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_gradients_block_by_block_are_those_of_the_whole_model(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "CHUNK_ELEMENTS", 5 * 256)  # the head in three chunks
    model = Checkpoint(make_model(tmp_path, architecture, dtype=torch.float32, tokenizer=False)).load(torch.float64)
    tokens_NT = make_tokens(3, 14)
    blocks = blocks_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(block_gradients(model, blocks, LAYERS, tokens_NT, tmp_path, squares=True))
    assert list(found) == list(reversed(blocks))
    expected = windows_of(model, tokens_NT, [f"{name}.{layer}" for name in blocks for layer in LAYERS])
    for name, gradients in found.items():
        for layer, gradient in gradients.items():
            windows_NOI = torch.stack(expected[f"{name}.{layer}"])
            for ours_OI, plain_OI in (
                (gradient.mean_OI, windows_NOI.mean(0)),
                (gradient.square_OI, windows_NOI.square().mean(0)),
            ):
                assert ours_OI is not None and ours_OI.dtype == torch.float64
                assert float((ours_OI - plain_OI).norm() / plain_OI.norm()) < 1e-9
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(tmp_path.glob("between-blocks-*")) == []


def test_without_squares_none_are_kept(tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path, tokenizer=False)).load(torch.float32)
    for _, gradients in block_gradients(model, blocks_of(model), LAYERS, make_tokens(2, 8), tmp_path, squares=False):
        assert all(gradient.square_OI is None for gradient in gradients.values())


def plain_importance(
    weights: Mapping[str, torch.Tensor],
    windows: Mapping[str, list[torch.Tensor]],
    group: Mapping[str, list[int]],
    chosen: LLMPruner,
) -> float:
    """Equations 3 to 5 and the sum over the group, written out for one group."""
    total = 0.0
    for layer, indices in group.items():
        weight_OI, gradients = weights[layer], windows[layer]
        for index in indices:
            at = (slice(None), index) if layer.endswith(("o_proj", "down_proj")) else index
            w = weight_OI[at]
            g = sum(gradient[at] for gradient in gradients) / len(gradients)
            f = sum(gradient[at] ** 2 for gradient in gradients) / len(gradients)
            salience = {
                ("taylor", "first"): w * g,
                ("taylor", "second"): w * w * f,
                ("taylor", "mixed"): w * g - 0.5 * w * w * f,
                ("l1", "first"): w.abs(),
                ("l2", "first"): w * w,
            }[chosen.importance, chosen.order]
            total += float(salience.sum().abs() if chosen.granularity == "vector" else salience.abs().sum())
    return total


@pytest.mark.parametrize("granularity", ["vector", "element"])
@pytest.mark.parametrize(
    ("importance", "order"),
    [("taylor", "first"), ("taylor", "second"), ("taylor", "mixed"), ("l1", "first"), ("l2", "first")],
)
def test_importances_are_those_of_the_equations(importance: str, order: str, granularity: str, tmp_path: Path) -> None:
    chosen = method(importance=importance, order=order, granularity=granularity)
    folder = make_model(tmp_path, dtype=torch.float32, layers=1, intermediate_size=24, tokenizer=False)
    model = Checkpoint(folder).load(torch.float64)
    tokens_NT, blocks = make_tokens(3, 10), blocks_of(model)
    windows = windows_of(model, tokens_NT, [f"model.layers.0.{layer}" for layer in LAYERS])
    windows = {layer: windows[f"model.layers.0.{layer}"] for layer in LAYERS}
    weights = {layer: model.get_submodule(f"model.layers.0.{layer}").weight.detach() for layer in LAYERS}
    ((name, gradients),) = block_gradients(model, blocks, LAYERS, tokens_NT, tmp_path, squares=order != "first")
    if importance != "taylor":
        gradients = {}
    for groups in traced(model)[name]:
        judge = Importance(chosen.importance, chosen.order, chosen.granularity)
        ours_G = judge.score(blocks[name], groups, gradients, torch.Generator())
        plain_G = [plain_importance(weights, windows, group, chosen) for group in as_lists(groups)]
        torch.testing.assert_close(ours_G, torch.tensor(plain_G, dtype=torch.float64), rtol=1e-9, atol=0.0)


def kept_rows(dense_OI: torch.Tensor, pruned_OI: torch.Tensor) -> list[int]:
    """Which rows of one weight are those of the other, found by their numbers."""
    matches = (pruned_OI[:, None] == dense_OI[None]).all(-1)
    assert bool((matches.sum(1) == 1).all())
    return matches.int().argmax(1).tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("importance", ["random", "taylor"])
def test_the_pruned_model_is_the_dense_one_with_the_groups_at_zero(
    architecture: str, importance: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture, dtype=torch.float32))
    tokens_NT = make_tokens(8, 16)
    result = method(importance=importance).apply(checkpoint.load(), context(tmp_path, checkpoint, tokens_NT))
    masked, size = checkpoint.load(), HEAD_DIM[architecture]
    chosen = set()
    for index, (pruned, block) in enumerate(zip(result.model.model.layers, masked.model.layers, strict=True)):
        channels = kept_rows(block.mlp.gate_proj.weight, pruned.mlp.gate_proj.weight)
        assert channels == kept_rows(block.mlp.up_proj.weight, pruned.mlp.up_proj.weight) == sorted(channels)
        assert len(channels) == CHANNELS // 2
        heads = kept_rows(block.self_attn.k_proj.weight, pruned.self_attn.k_proj.weight)
        assert heads == kept_rows(block.self_attn.v_proj.weight, pruned.self_attn.v_proj.weight)
        kept = head_groups(2, size)[heads[0] // size]
        assert heads == kept["self_attn.k_proj"]
        assert kept_rows(block.self_attn.q_proj.weight, pruned.self_attn.q_proj.weight) == kept["self_attn.q_proj"]
        gone = torch.ones(CHANNELS, dtype=torch.bool)
        gone[channels] = False
        block.mlp.down_proj.weight.data[:, gone] = 0
        gone = torch.ones(HEADS * size, dtype=torch.bool)
        gone[kept["self_attn.o_proj"]] = False
        block.self_attn.o_proj.weight.data[:, gone] = 0
        chosen.add((index, heads[0]))
    with torch.no_grad():
        ours, plain = result.model(tokens_NT).logits, masked(tokens_NT).logits
        dense = checkpoint.load()(tokens_NT).logits
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert float((dense - plain).abs().max()) > 0.01  # what was removed was not nothing


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_stock_transformers_loads_the_result_from_config_json_alone(architecture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture))
    if architecture in ("llama", "mistral"):
        edit_config(checkpoint.path, head_dim=None)  # as in older files: what follows from the number of heads
    result = method(importance="l1").apply(checkpoint.load(), context(tmp_path, checkpoint))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    save_model(result.model, checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (2, 1, 64)
    stock, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    tokens_NT = make_tokens(2)
    with torch.no_grad():
        assert torch.equal(stock(tokens_NT).logits, result.model(tokens_NT).logits)
    assert stock.generate(tokens_NT[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    counted = {key: result.metrics[f"{key}_after"] for key in ("num_attention_heads", "intermediate_size")}
    assert counted == {"num_attention_heads": 2, "intermediate_size": 64}
    assert result.metrics["parameters_after"] == sum(parameter.numel() for parameter in stock.parameters())
    assert result.metrics["parameters_before"] > result.metrics["parameters_after"]


def test_what_is_switched_off_stays(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, tokenizer=False))
    only_mlp = method(importance="l2", attention=False, ratio=0.3, round_to=16)
    model = only_mlp.apply(checkpoint.load(), context(tmp_path, checkpoint)).model
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert model.config.intermediate_size == 96  # 89.6, to the nearest multiple of 16
    model = method(importance="l2", mlp=False).apply(checkpoint.load(), context(tmp_path, checkpoint)).model
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (2, 128)
    assert model.model.layers[0].self_attn.o_proj.weight.shape == (64, 32)


def test_modes_gradients_and_global_state_are_as_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", tokenizer=False))
    model = checkpoint.load()
    model.train()
    model.model.norm.weight.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        model = method().apply(model, context(tmp_path, checkpoint, make_tokens(8, 16))).model
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.norm.weight"}


def test_random_choices_depend_on_the_seed_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, tokenizer=False))
    found = []
    for seed, global_seed in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(global_seed)
        model = method(importance="random").apply(checkpoint.load(), context(tmp_path, checkpoint, seed=seed)).model
        found.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_taylor_keeps_what_the_loss_needs(tmp_path: Path) -> None:
    """On windows the model has to predict, removing the least important half costs less than removing the rest."""
    checkpoint = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32))
    model = checkpoint.load()
    for block in model.model.layers:  # half of the channels hardly count, and no norm of gate and up says which
        block.mlp.down_proj.weight.data[:, ::2] *= 0.01
    result = method(attention=False).apply(model, context(tmp_path, checkpoint, make_tokens(8, 16)))
    for pruned, block in zip(result.model.model.layers, checkpoint.load().model.layers, strict=True):
        assert all(channel % 2 for channel in kept_rows(block.mlp.gate_proj.weight, pruned.mlp.gate_proj.weight))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "said", "remedy"),
    [
        ({"ratio": 0.9}, "ratio 0.9 of 2 KV groups of a block leaves none", "lower `ratio`, or set attention: false"),
        ({"ratio": 0.1}, "ratio 0.1 of 2 KV groups of a block removes none", "raise `ratio`, or set attention: false"),
        ({"attention": False, "round_to": 512}, "of 128 MLP channels .* multiple of 512, leaves none", "`round_to`"),
        ({"attention": False, "ratio": 0.01}, "of 128 MLP channels .* removes none", "raise `ratio`"),
    ],
)
def test_a_ratio_that_leaves_nothing_or_removes_nothing_is_refused_before_any_gradient(
    changes: dict[str, Any], said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruner_module, "block_gradients", None)
    checkpoint = Checkpoint(make_model(tmp_path, tokenizer=False))
    with pytest.raises(StepError, match=said) as caught:
        method(**changes).apply(checkpoint.load(), context(tmp_path, checkpoint, make_tokens(8, 16)))
    assert remedy in str(caught.value.problems[0].remedy)


def test_heads_that_config_json_cannot_say_are_refused_with_those_that_it_can(tmp_path: Path) -> None:
    """Transformers wants Llama's width to be a multiple of the number of heads, even where head_dim is given."""
    checkpoint = Checkpoint(make_model(tmp_path, kv_heads=4, tokenizer=False))
    with pytest.raises(StepError, match="num_attention_heads 3") as caught:
        method(importance="l2", ratio=0.25).apply(checkpoint.load(), context(tmp_path, checkpoint))
    remedy = str(caught.value.problems[0].remedy)
    assert "leaves 1 or 2 of 4 KV groups" in remedy and "attention: false" in remedy
    qwen = Checkpoint(make_model(tmp_path / "qwen", "qwen2", kv_heads=4, tokenizer=False))
    model = method(importance="l2", ratio=0.25).apply(qwen.load(), context(tmp_path, qwen)).model
    assert (model.config.num_attention_heads, model.config.head_dim) == (3, 16)


def test_head_sizes_that_follow_from_the_width_alone_are_refused(tmp_path: Path) -> None:
    neox = Checkpoint(make_model(tmp_path, "gpt_neox", tokenizer=False))
    with pytest.raises(StepError, match=r"query_key_value\.weight would become|tracing found") as caught:
        method(importance="l2", mlp=False).apply(neox.load(), context(tmp_path, neox))
    assert "attention: false" in str(caught.value.problems[0].remedy)
    model = method(importance="l2", attention=False).apply(neox.load(), context(tmp_path, neox)).model
    assert model.config.intermediate_size == 64


def test_heads_that_a_norm_ties_together_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "olmo2", vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    checkpoint = Checkpoint(make_model(tmp_path, tokenizer=False))
    with pytest.raises(StepError, match=r"found 1 groups around self_attn\.o_proj, but .* num_key_value_heads as 4"):
        method(importance="l2").apply(model, context(tmp_path, checkpoint))


def test_without_windows_or_with_one_there_is_a_step_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, tokenizer=False))
    for chosen in (method(), method(importance="l2", lora_rank=2)):
        assert chosen.needs_calibration()
        with pytest.raises(StepError, match="no calibration set"):
            chosen.apply(checkpoint.load(), context(tmp_path, checkpoint))
        with pytest.raises(StepError, match="1 windows of 16 tokens are too few"):
            chosen.apply(checkpoint.load(), context(tmp_path, checkpoint, make_tokens(1, 16)))
    assert not method(importance="random").needs_calibration()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path, tokenizer=False))
    model = checkpoint.load()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(StepError, match=r"importances of groups of model\.layers\.1"):
        method(importance="l2").apply(model, context(tmp_path, checkpoint))


def test_nothing_to_remove_and_a_missing_peft_are_refused_while_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="nothing to remove"):
        method(attention=False, mlp=False)
    method(lora_rank=8).preflight()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    method(lora_rank=0).preflight()
    with pytest.raises(PreflightError, match="peft") as caught:
        method(lora_rank=8).preflight()
    assert "compression-orchestrator[lora]" in str(caught.value.problems[0].remedy)


def test_the_estimate_grows_with_what_is_done(tmp_path: Path) -> None:
    facts: ModelFacts = facts_of(Checkpoint(make_model(tmp_path)))
    sizes = (64, 128)
    by_size = method(importance="l2").estimate(facts, facts, sizes)
    taylor = method(gradient_windows=8).estimate(facts, facts, sizes)
    more = method(gradient_windows=16).estimate(facts, facts, sizes)
    recovered = method(importance="l2", lora_rank=4).estimate(facts, facts, sizes)
    assert by_size.operations < taylor.operations < more.operations
    assert by_size.operations < recovered.operations
    assert by_size.memory_bytes < taylor.memory_bytes == more.memory_bytes
    assert more.scratch_bytes == 2 * taylor.scratch_bytes == 4 * 16 * 16 * 64 * 4


# Recovery.


def repeated_tokens(windows: int = 16, length: int = 16) -> torch.Tensor:
    """Windows that go round one sequence of tokens: something to learn."""
    return (make_tokens(1, 24)[0].repeat(40)[: windows * length]).view(windows, length)


def test_recovery_lowers_the_loss_and_is_merged(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    chosen = method(lora_rank=4, lora_updates=30, lora_learning_rate=5e-3, lora_objective="text")
    seen: list[tuple[float, str]] = []
    watched = replace(
        context(tmp_path, checkpoint, repeated_tokens()), progress=lambda share, text: seen.append((share, text))
    )
    model = checkpoint.load()
    result = chosen.apply(model, watched)
    metrics = result.metrics
    assert metrics["loss_recovered"] < 0.9 * metrics["loss_pruned"]
    assert metrics["parameters_after"] == sum(parameter.numel() for parameter in result.model.parameters())
    assert result.model is model
    names = set(result.model.state_dict())
    assert names == set(checkpoint.load().state_dict())
    assert {type(m) for n, m in result.model.named_modules() if n.endswith("_proj")} == {torch.nn.Linear}
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not hasattr(result.model, "peft_config")
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == 3 + 30
    save_model(result.model, checkpoint, tmp_path / "out")
    tokens_NT = repeated_tokens()
    with torch.no_grad():
        expected = result.model(tokens_NT).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens_NT).logits, expected)


def test_recovery_changes_only_the_layers_of_the_blocks_and_repeats(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", tokenizer=False))
    plain = method(importance="l2").apply(checkpoint.load(), context(tmp_path, checkpoint)).model.state_dict()
    chosen = method(importance="l2", lora_rank=2, lora_updates=3)
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        result = chosen.apply(checkpoint.load(), context(tmp_path, checkpoint, repeated_tokens()))
        states.append(result.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in plain)
    changed = {name for name in plain if not torch.equal(plain[name], states[0][name])}
    assert changed == {name for name in plain if name.endswith("_proj.weight")}


def test_a_diverging_recovery_is_a_step_error_that_says_what_to_do(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", tokenizer=False))
    model = checkpoint.load()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(StepError, match="diverged at update 1") as caught:
        method(importance="l2", lora_rank=2).apply(model, context(tmp_path, checkpoint, repeated_tokens()))
    assert "lora_learning_rate" in str(caught.value.problems[0].remedy)


# In a pipeline.

EXAMPLE = Path(__file__).parents[1] / "flows" / "specs" / "llm-pruner.yaml"


def example(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """The example specification at a small scale, with changes to the parameters of its stages."""
    make_model(folder / "model", hidden_size=64, intermediate_size=128)
    (folder / "text.txt").write_text("seven wizards quietly judge my vow, layer by layer\n" * 400)
    spec = yaml.safe_load(EXAMPLE.read_text())
    spec["model"] = {"id": "model"}
    small: dict[str, Mapping[str, Any]] = {
        "calibrate": {"source": "text.txt", "sequences": 12, "length_tokens": 32},
        "prune": {
            "ratio": 0.5,
            "attention": True,
            "round_to": 32,
            "length_tokens": 32,
            "lora_updates": 4,
            "lora_learning_rate": 1e-3,
        },
        "quantize": {"group_size": 32},
        "validate": {"source": "text.txt", "length_tokens": 32, "windows": 8},
    }
    steps = [step for step in spec["steps"] if "register" not in step]
    for step in steps:
        stage = next(iter(step.keys() & small.keys()))
        step["with"] = {**step["with"], **small[stage], **changes.get(stage, {})}
        step.pop("require", None)
    spec["steps"] = steps
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def run(path: Path, tracking_uri: str) -> Execution:
    return run_locally(path, discover(), Settings(path.parent / "home", tracking_uri=tracking_uri), Watcher())


def test_the_example_runs_from_calibration_to_a_quantized_model(tmp_path: Path, tracking_uri: str) -> None:
    execution = run(example(tmp_path), tracking_uri)
    stages = [outcome.stage for outcome in execution.outcomes.values()]
    assert stages == ["calibrate", "prune", "quantize", "validate"]
    pruned, quantized = (Checkpoint(execution.outcomes[index].path) for index in (1, 2))
    assert (pruned.config["num_key_value_heads"], pruned.config["intermediate_size"]) == (1, 64)
    assert quantized.is_quantized and quantized.config["intermediate_size"] == 64
    assert quantized.tensors["model.layers.0.mlp.down_proj.weight_packed"].shape[0] == 64
    metrics = execution.outcomes[1].metrics
    assert metrics["kl_recovered"] < metrics["kl_pruned"]
    assert execution.outcomes[3].metrics["perplexity"] > 1


def test_recovery_trains_on_a_text_of_its_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    (tmp_path / "text.txt").write_text("seven wizards quietly judge my vow, layer by layer\n" * 400)
    found = []
    for source in (None, str(tmp_path / "text.txt")):
        chosen = method(importance="l2", lora_rank=2, lora_updates=4, source=source, sequences=8)
        found.append(chosen.apply(checkpoint.load(), context(tmp_path, checkpoint, repeated_tokens())).metrics)
    assert found[0]["kl_pruned"] == found[1]["kl_pruned"]  # measured on the calibration windows all the same
    assert found[0]["kl_recovered"] != found[1]["kl_recovered"]


def test_what_recovery_follows_is_the_divergence_from_the_dense_model(tmp_path: Path) -> None:
    """Against the definition, in float64."""
    checkpoint = Checkpoint(make_model(tmp_path, dtype=torch.float32, tokenizer=False))
    tokens_NT = repeated_tokens(24)
    model = method(importance="l2").apply(checkpoint.load(), context(tmp_path, checkpoint, tokens_NT)).model
    result = method(importance="l2", lora_rank=1, lora_updates=1).apply(
        checkpoint.load(), context(tmp_path, checkpoint, tokens_NT)
    )
    with torch.no_grad():
        p_NTV, q_NTV = (m(tokens_NT[:3]).logits.double().softmax(-1) for m in (checkpoint.load(), model))
    expected = float((p_NTV * (p_NTV.log() - q_NTV.log())).sum(-1).mean())
    assert result.metrics["kl_pruned"] == pytest.approx(expected, rel=1e-5)
