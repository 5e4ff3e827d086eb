"""Removal of whole decoder layers: which go, and that what is left is what config.json says.

Shape legend: N = windows, B = windows of a batch, T = tokens of a window, D = model width, V = vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from orchestrator.api import CalibrationSet, Checkpoint, Context, Invariant, StepError
from orchestrator.canonical import file_sha256
from orchestrator.errors import PreflightError, SpecError
from orchestrator.export import save_model
from orchestrator.facts import facts_of
from orchestrator.foreseen import check_foreseen, with_blocks
from orchestrator.home import Settings
from orchestrator.invariants import check_artifact
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import discover
from orchestrator.run import run_locally
from orchestrator_pruning.decoder import DecoderLayers
from orchestrator_pruning.depth import Depth, summed_loss
from tests.test_run import Watcher
from tests.tiny import ARCHITECTURES, OTHER_ARCHITECTURES, edit_config, make_model, make_tokens

NUM_LAYERS = 3  # of the models of all architectures; gemma3_text has no others here


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder: Path, tokens_NT: torch.Tensor, **parameters: Any) -> tuple[Any, dict[str, float], tuple[int, ...]]:
    """Apply the method to a checkpoint; return model, metrics and the layers that are left."""
    checkpoint = Checkpoint(folder)
    fractions: list[float] = []
    context = Context(
        seed=0,
        dense=checkpoint,
        calibration=CalibrationSet(tokens_NT, {}),
        scratch=folder / "scratch",
        progress=lambda fraction, message: fractions.append(fraction),
    )
    result = Depth(**parameters).apply(checkpoint.load(), context)
    assert fractions == sorted(fractions)
    assert fractions[0] > 0
    assert fractions[-1] == 1
    assert result.blocks is not None
    return result.model, dict(result.metrics), result.blocks


def stock(folder: Path, dtype: Any = "auto") -> Any:
    """The model as Transformers loads it from its config.json, with nothing of ours."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits_BTV: torch.Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    return logits_BTV


def removed_in_turn(metrics: dict[str, float]) -> list[int]:
    return [int(metrics[f"removed_layer_{turn}"]) for turn in range(1, int(metrics["removed_layers"]) + 1)]


def blocks_of(model: Any) -> nn.ModuleList:
    """Where the tests know the decoder layers to be."""
    body = model.base_model
    blocks: nn.ModuleList = body.h if hasattr(body, "h") else getattr(body, "decoder", body).layers
    return blocks


def sampled(folder: Path, sequences: int, length: int) -> torch.Tensor:
    """Windows that the model itself has drawn, so that no other distribution suits them better than its own."""
    model = stock(folder, torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(2, 250, (sequences, 1), generator=generator)
    for _ in range(length - 1):
        probabilities_NV = logits_of(model, tokens_NT)[:, -1].softmax(-1)
        tokens_NT = torch.cat([tokens_NT, torch.multinomial(probabilities_NV, 1, generator=generator)], dim=1)
    return tokens_NT


# Which layers go


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox", "phi3"])
def test_block_influence_is_that_of_a_plain_reference(architecture: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture, layers=NUM_LAYERS, tokenizer=False)
    tokens_NT = make_tokens(6, 24)
    _, metrics, kept = run(folder, tokens_NT, layers=1)

    reference = stock(folder, torch.float64)
    # Transformers gives the last hidden states with the final norm on them, which is no layer's doing.
    for name in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(reference.base_model, name):
            setattr(reference.base_model, name, nn.Identity())
    with torch.no_grad():
        states = reference(input_ids=tokens_NT, use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == NUM_LAYERS + 1
    influence = []
    for before_NTD, after_NTD in pairwise(states):
        dot_NT = (before_NTD * after_NTD).sum(-1)
        influence.append(1 - float((dot_NT / (before_NTD.norm(dim=-1) * after_NTD.norm(dim=-1))).mean()))
    found = [metrics[f"block_influence_{index}"] for index in range(NUM_LAYERS)]
    assert found == pytest.approx(influence, abs=2e-6)
    assert max(found) - min(found) > 1e-3
    lowest = min(range(NUM_LAYERS), key=lambda index: influence[index])
    assert removed_in_turn(metrics) == [lowest]
    assert kept == tuple(index for index in range(NUM_LAYERS) if index != lowest)


def without(folder: Path, gone: set[int]) -> Any:
    """The stock model, in float64, from whose list layers are deleted by hand."""
    model = stock(folder, torch.float64)
    kept = [index for index in range(model.config.num_hidden_layers) if index not in gone]
    blocks = [blocks_of(model)[index] for index in kept]
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        model.config.layer_types = [types[index] for index in kept]
    model.config.num_hidden_layers = len(kept)
    body = getattr(model.base_model, "decoder", model.base_model)
    setattr(body, "h" if hasattr(body, "h") else "layers", nn.ModuleList(blocks))
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_greedy_is_what_deleting_and_evaluating_finds(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, turns = 4, 2
    folder = make_model(tmp_path / "model", architecture, layers=depth, tokenizer=False)
    tokens_NT = make_tokens(5, 24)
    monkeypatch.setattr("orchestrator_pruning.depth._BATCH_TOKENS", 50)  # two windows, two windows, one
    _, metrics, kept = run(folder, tokens_NT, layers=turns, criterion="greedy")

    def loss(gone: set[int]) -> float:
        with torch.no_grad():
            return float(without(folder, gone)(input_ids=tokens_NT, labels=tokens_NT, use_cache=False).loss)

    gone: list[int] = []
    for turn in range(turns):
        losses = {index: loss({*gone, index}) for index in range(depth) if index not in gone}
        if turn == 0:
            assert {index: metrics[f"loss_without_{index}"] for index in range(depth)} == pytest.approx(
                losses, rel=1e-5
            )
        best, second = sorted(losses, key=lambda index: losses[index])[:2]
        assert losses[second] - losses[best] > 1e-4  # else the test would say nothing
        gone.append(best)
        assert metrics[f"loss_after_removal_{turn + 1}"] == pytest.approx(losses[best], rel=1e-5)
    assert removed_in_turn(metrics) == gone
    assert kept == tuple(index for index in range(depth) if index not in gone)
    assert metrics["loss_before"] == pytest.approx(loss(set()), rel=1e-5)
    assert metrics["loss_after"] == pytest.approx(loss(set(gone)), rel=1e-5)


@pytest.mark.parametrize("criterion", ["block_influence", "greedy"])
@pytest.mark.parametrize("idle", [0, 2, 3])
def test_a_layer_that_does_nothing_goes_first(criterion: str, idle: int, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=4, tokenizer=False)
    model = stock(folder)
    for weight in (model.model.layers[idle].self_attn.o_proj.weight, model.model.layers[idle].mlp.down_proj.weight):
        weight.data.zero_()
    model.save_pretrained(folder)
    pruned, metrics, _ = run(folder, sampled(folder, 48, 24), layers=1, criterion=criterion)
    assert removed_in_turn(metrics) == [idle]
    assert metrics["loss_after"] == metrics["loss_before"]
    if criterion == "block_influence":
        assert metrics[f"block_influence_{idle}"] == pytest.approx(0, abs=1e-12)
    tokens_BT = make_tokens(2, 20)
    assert torch.equal(logits_of(pruned, tokens_BT), logits_of(stock(folder), tokens_BT))


def test_layers_that_do_nothing_go_together(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=4, tokenizer=False)
    model = stock(folder)
    for layer in (model.model.layers[1], model.model.layers[3]):
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder)
    for criterion in ("block_influence", "greedy"):
        _, metrics, _ = run(folder, sampled(folder, 48, 24), layers=2, criterion=criterion)
        # What greedy compares is equal to the bit, so the first of the two goes first.
        turns = removed_in_turn(metrics)
        assert (turns if criterion == "greedy" else sorted(turns)) == [1, 3]


# What is left


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHER_ARCHITECTURES])
@pytest.mark.parametrize("kept", [(0, 1), (0, 2), (1, 2), (2,)])
def test_stock_transformers_loads_what_is_left(architecture: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    source = Checkpoint(make_model(tmp_path / "model", architecture, layers=NUM_LAYERS))
    model: Any = source.load()
    tokens_BT = make_tokens(3, 24)  # three windows of attention long
    layers = DecoderLayers(model)
    layers.run(tokens_BT, (), lambda *seen: None)  # learns what a layer puts out
    gone = [index for index in range(NUM_LAYERS) if index not in kept]
    with torch.no_grad():
        expected_BTV = layers.run(tokens_BT, gone)
    assert not torch.equal(expected_BTV, logits_of(model, tokens_BT))
    layers.keep(kept)
    assert len(layers) == len(blocks_of(model)) == len(kept)
    assert torch.equal(logits_of(model, tokens_BT), expected_BTV)

    save_model(model, source, tmp_path / "left")
    loaded = stock(tmp_path / "left")
    assert len(blocks_of(loaded)) == len(kept)
    assert torch.equal(logits_of(loaded, tokens_BT), expected_BTV)
    # With a KV cache, which finds a layer's part by the layer's number.
    prompt = {"input_ids": tokens_BT[:, :12], "attention_mask": torch.ones(3, 12, dtype=torch.int64)}
    written = [m.generate(**prompt, max_new_tokens=8, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*written)
    # And what the core makes of the folder.
    left = Checkpoint(tmp_path / "left")
    check_foreseen(with_blocks(source, range(len(kept))), left, kept)
    assert len(facts_of(left).blocks) == len(kept)


@pytest.mark.parametrize(
    ("architecture", "kept", "expected"),
    [
        ("qwen2", (1, 2), {"max_window_layers": 0, "layer_types": ["sliding_attention"] * 2}),
        ("qwen2", (0, 2), {"max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]}),
        ("gemma2", (0, 2), {"layer_types": ["sliding_attention"] * 2}),
        ("gemma3_text", (1, 2), {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen2_moe", (1, 2), {"mlp_only_layers": []}),
        ("qwen3_moe", (0, 2), {"mlp_only_layers": [0]}),
        ("gpt2", (0, 2), {"n_layer": 2}),
    ],
)
def test_lists_of_layers_in_the_configuration_are_cut(
    architecture: str, kept: tuple[int, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    source = Checkpoint(make_model(tmp_path / "model", architecture, layers=NUM_LAYERS, tokenizer=False))
    model = source.load()
    DecoderLayers(model).keep(kept)
    save_model(model, source, tmp_path / "left")
    config = json.loads((tmp_path / "left" / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    assert config.get("num_hidden_layers", config.get("n_layer")) == len(kept)


def test_experts_in_every_second_layer_stay_where_they_are(tmp_path: Path) -> None:
    """`decoder_sparse_step` counts layers; without some of them only a list can say which have experts."""
    folder = make_model(tmp_path / "model", "qwen3_moe", layers=4, tokenizer=False)
    config = {**json.loads((folder / "config.json").read_text()), "decoder_sparse_step": 2, "mlp_only_layers": []}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(type(stock(folder).config).from_dict(config))
    model.save_pretrained(folder)
    source = Checkpoint(folder)
    model = source.load()
    DecoderLayers(model).keep((1, 2, 3))
    save_model(model, source, tmp_path / "left")
    loaded = stock(tmp_path / "left")
    assert torch.equal(logits_of(loaded, make_tokens(2, 9)), logits_of(model, make_tokens(2, 9)))
    assert ["experts" in dict(block.mlp.named_children()) for block in blocks_of(loaded)] == [True, False, True]


def test_another_name_for_the_number_of_layers_does_not_stay_behind(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt2", layers=NUM_LAYERS, tokenizer=False)
    edit_config(folder, n_layer=None, num_hidden_layers=NUM_LAYERS)
    source = Checkpoint(folder)
    model = source.load()
    DecoderLayers(model).keep((0, 2))
    save_model(model, source, tmp_path / "left")
    config = json.loads((tmp_path / "left" / "config.json").read_text())
    assert config["n_layer"] == 2
    assert "num_hidden_layers" not in config
    assert len(blocks_of(stock(tmp_path / "left"))) == 2


@pytest.mark.parametrize("criterion", ["block_influence", "greedy"])
def test_weights_are_those_of_the_source_bit_for_bit(criterion: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=NUM_LAYERS, tied=True, tokenizer=False)
    model, _, kept = run(folder, make_tokens(), layers=1, criterion=criterion)
    source = stock(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for new, old in enumerate(kept):
        for name, tensor in source.model.layers[old].state_dict().items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(model.model.layers[new].state_dict()[name], tensor)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)


@pytest.mark.parametrize("criterion", ["block_influence", "greedy"])
def test_the_same_input_gives_the_same_bytes(criterion: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=NUM_LAYERS, tokenizer=False)
    digests, numbers = [], []
    for attempt in range(2):
        torch.manual_seed(attempt)
        model, metrics, _ = run(folder, make_tokens(), layers=1, criterion=criterion)
        save_model(model, Checkpoint(folder), tmp_path / str(attempt))
        digests.append([file_sha256(path) for path in sorted((tmp_path / str(attempt)).iterdir())])
        numbers.append(metrics)
    assert digests[0] == digests[1]
    assert numbers[0] == numbers[1]


def test_the_loss_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTV, tokens_BT = torch.randn(2, 7, 11, generator=generator), torch.randint(0, 11, (2, 7))
    wanted = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).double(), tokens_BT[:, 1:].flatten(), reduction="sum"
    )
    assert summed_loss(logits_BTV, tokens_BT) == pytest.approx(float(wanted), rel=1e-6)
    monkeypatch.setattr("orchestrator_pruning.depth._CHUNK_ELEMENTS", 25)  # two tokens
    assert summed_loss(logits_BTV, tokens_BT) == pytest.approx(float(wanted), rel=1e-6)


# Zeros of earlier steps


def zero_some(folder: Path) -> Checkpoint:
    """Set other weights to zero in each layer."""
    model = stock(folder)
    for index, layer in enumerate(model.model.layers):
        for name, weight in layer.named_parameters():
            if name.endswith("proj.weight"):
                generator = torch.Generator().manual_seed(index)
                weight.data[torch.rand(weight.shape, generator=generator) < 0.3 + 0.1 * index] = 0
    model.save_pretrained(folder)
    return Checkpoint(folder)


def test_kept_zeros_are_compared_with_those_of_the_layer_they_come_from(tmp_path: Path) -> None:
    source = zero_some(make_model(tmp_path / "model", layers=4, tokenizer=False))
    before = check_artifact(source, source, {})
    assert before["zeros"]["layers"] == 4 * 7
    assert Invariant.ZEROS in Depth.keeps
    model, _, kept = run(source.path, make_tokens(), layers=2)
    save_model(model, source, tmp_path / "left")
    left = Checkpoint(tmp_path / "left")
    after = check_artifact(source, left, before, blocks=kept)
    assert after["zeros"]["layers"] == 2 * 7
    for wrong in {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)} - {kept}:
        with pytest.raises(StepError, match="lost"):
            check_artifact(source, left, before, blocks=wrong)
    for short in (None, kept[:1], (*kept, 9)[1:]):
        with pytest.raises(StepError, match="only one of the two models"):
            check_artifact(source, left, before, blocks=short)
    model.model.layers[1].mlp.up_proj.weight.data += 0.5
    save_model(model, source, tmp_path / "broken")
    with pytest.raises(StepError, match=r"layers\.1\.mlp\.up_proj lost"):
        check_artifact(source, Checkpoint(tmp_path / "broken"), before, blocks=kept)


def test_another_depth_than_was_planned_is_refused(tmp_path: Path) -> None:
    source = Checkpoint(make_model(tmp_path / "model", layers=3, tokenizer=False))
    with pytest.raises(StepError, match="3 decoder blocks are left, though the method's `blocks_removed` means 2"):
        check_foreseen(with_blocks(source, (0, 1)), source, None)


# What is refused


def test_no_layer_would_be_left(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=2, tokenizer=False)
    with pytest.raises(StepError, match="2 layers are to be removed, but the model has 2") as caught:
        run(folder, make_tokens(), layers=2)
    assert "at most 1" in str(caught.value)


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        (None, "no calibration tokens"),
        (torch.zeros((0, 8), dtype=torch.int64), "no calibration tokens"),
        (torch.full((8, 1), 3), "predict nothing"),
    ],
)
def test_nothing_to_measure_on(calibration: torch.Tensor | None, said: str, tmp_path: Path) -> None:
    source = Checkpoint(make_model(tmp_path / "model", layers=2, tokenizer=False))
    given = None if calibration is None else CalibrationSet(calibration, {})
    with pytest.raises(StepError, match=said):
        Depth(layers=1).apply(source.load(), Context(0, source, given, tmp_path))


def test_layers_that_depend_on_their_place_are_refused_before_the_search(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt2", layers=3, tokenizer=False)
    edit_config(folder, scale_attn_by_inverse_layer_idx=True)
    source = Checkpoint(folder)
    model = source.load()
    before = logits_of(model, make_tokens(2, 9))

    def progress(fraction: float, message: str) -> None:
        pytest.fail("the search had begun")

    context = Context(0, source, CalibrationSet(make_tokens(), {}), tmp_path, progress)
    with pytest.raises(StepError, match="scaling of attn") as caught:
        Depth(layers=1).apply(model, context)
    assert "'gpt2'" in str(caught.value)
    assert model.config.n_layer == 3
    assert torch.equal(logits_of(model, make_tokens(2, 9)), before)


def test_an_architecture_of_which_nothing_is_known_here(tmp_path: Path) -> None:
    """GPT-Neo: attention with and without a window by turns, in a list that is made from another when it is built."""
    from transformers import GPTNeoConfig

    config = GPTNeoConfig(
        vocab_size=256,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=64,
        window_size=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    model: Any = source.load()
    DecoderLayers(model).keep((0, 2, 3))
    save_model(model, source, tmp_path / "left")
    loaded = stock(tmp_path / "left")
    assert loaded.config.attention_layers == ["global", "global", "local"]
    assert torch.equal(logits_of(loaded, make_tokens(2, 20)), logits_of(model, make_tokens(2, 20)))


def test_what_config_json_would_lose_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Checkpoint(make_model(tmp_path / "model", layers=3, tokenizer=False)).load()
    kind = type(model.config)
    plain = kind.to_dict
    for lost, said in (("num_hidden_layers", "would have shape"), ("rms_norm_eps", "rms_norm_eps|variance_epsilon")):
        monkeypatch.setattr(
            kind, "to_dict", lambda self, lost=lost: {k: v for k, v in plain(self).items() if k != lost}
        )
        model.config.rms_norm_eps = 0.25
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.25
        with pytest.raises(StepError, match=rf"config\.json cannot describe a 'llama' model.*({said})"):
            DecoderLayers(model).keep((0, 2))
        assert len(model.model.layers) == model.config.num_hidden_layers == 3


def test_layers_that_are_no_single_list_are_refused(tmp_path: Path) -> None:
    model: Any = Checkpoint(make_model(tmp_path / "model", layers=2, tokenizer=False)).load()
    model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(PreflightError, match="2 lists of 2 modules"):
        DecoderLayers(model)


@pytest.mark.parametrize("criterion", ["block_influence", "greedy"])
def test_a_model_that_overflows_is_refused(criterion: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", layers=3, tokenizer=False)
    model = stock(folder)
    model.model.embed_tokens.weight.data[7] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(StepError, match="loss on the calibration windows is nan"):
        run(folder, torch.full((4, 8), 7), layers=1, criterion=criterion)


# Planning and the whole chain

CHAIN = """\
version: 1
name: shallow
model: {id: model}
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 8, length_tokens: 32}
  - prune: wanda
    with: {sparsity: 0.5}
  - prune: depth
    with: {layers: 1, criterion: greedy}
  - quantize: gptq
    with: {num_bits: 4, group_size: 32}
  - validate: perplexity
    with: {source: text.txt, length_tokens: 32, windows: 8}
  - register: release
    engines: [{vllm: {gpu_memory_gib: 8, max_model_len: 32}}]
"""


@pytest.fixture
def planner(tmp_path: Path) -> Callable[[str], Plan]:
    make_model(tmp_path / "model", layers=4)
    (tmp_path / "text.txt").write_text("the quick brown fox reads a book of words. " * 400, encoding="utf-8")

    def plan(text: str) -> Plan:
        (tmp_path / "spec.yaml").write_text(text, encoding="utf-8")
        return make_plan(tmp_path / "spec.yaml", discover(), tmp_path / "home")

    return plan


def test_the_chain_serves_a_quantized_model_of_fewer_layers(
    planner: Callable[[str], Plan], tmp_path: Path, tracking_uri: str
) -> None:
    planner(CHAIN)
    settings = Settings(tmp_path / "home", tracking_uri)
    document = run_locally(tmp_path / "spec.yaml", discover(), settings, Watcher()).document()
    shallow, quantized = (Path(document["steps"][step]["artifact"]["path"]) for step in (2, 3))
    assert document["steps"][2]["metrics"]["removed_layers"] == 1
    assert json.loads((shallow / "manifest.json").read_text())["invariants"]["zeros"]["layers"] == 3 * 7
    for folder in (shallow, quantized):
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3
    layers = json.loads((quantized / "layers.json").read_text())
    assert {name.split(".")[2] for name in layers} == {"0", "1", "2"}
    assert len(blocks_of(stock(quantized, torch.bfloat16))) == 3
    served = Path(document["release"]["uri"].removeprefix("file://")) / "serving" / "vllm" / "kv-plan.json"
    # K and V of 3 layers, 2 heads of 16, in bfloat16.
    assert json.loads(served.read_text())["bytes_per_token"] == 3 * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{layers: 1, criterion", "{layers: 4, criterion", "10: .*would remove 4 decoder layers of a model that has 4"),
        (
            "  - quantize: gptq",
            "  - prune: depth\n    with: {layers: 3}\n  - quantize: gptq",
            "12: .*would remove 3 decoder layers of a model that has 3 at this point",
        ),
        ("group_size: 32}", "group_size: 32}\n    skip: [layers.3.*]", "'layers.3.*' matches no layer"),
        ("{layers: 1, ", "{", "the key .layers. is missing"),
        ("{layers: 1, ", "{layers: 0, ", "layers: .*greater than or equal to 1"),
        (
            "steps:\n  - calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 32}\n"
            "  - prune: wanda\n"
            "    with: {sparsity: 0.5}\n",
            "steps:\n",
            "prune depth needs a calibration set",
        ),
    ],
)
def test_a_mistake_is_refused_while_planning(planner: Callable[[str], Plan], old: str, new: str, said: str) -> None:
    assert old in CHAIN
    with pytest.raises(SpecError, match=said):
        planner(CHAIN.replace(old, new))


def test_layers_can_be_removed_from_a_quantized_model(planner: Callable[[str], Plan]) -> None:
    """They are stored as they were; `test_distillation_grids` runs it."""
    depth, end = CHAIN[CHAIN.index("  - prune: depth") : CHAIN.index("  - quantize")], CHAIN.index("  - validate")
    plan = planner(CHAIN[:end].replace(depth, "") + depth + CHAIN[end:])
    labels = [step.label for step in plan.steps]
    assert labels.index("quantize gptq") < labels.index("prune depth")


@pytest.mark.parametrize(("removed", "kept"), [(1, (0, 2, 3)), (2, (0, 3)), (3, (0,))])
def test_evenly_leaves_the_first_layer_and_the_last(removed: int, kept: tuple[int, ...], tmp_path: Path) -> None:
    source = Checkpoint(make_model(tmp_path / "model", layers=4))
    context = Context(0, source, CalibrationSet(make_tokens(), {}), tmp_path)
    result = Depth(layers=removed, criterion="evenly").apply(source.load(), context)
    assert result.blocks == kept
    assert result.metrics["loss_after"] > 0


def test_an_engine_that_only_the_shallower_model_fits_is_accepted(planner: Callable[[str], Plan]) -> None:
    """16 tokens of one layer take 16 * 2 * 2 * 16 * 2 bytes: a pool that holds two blocks of 3 layers and not of 4.

    vLLM keeps one of them for itself.
    """
    block = 16 * 2 * 2 * 16 * 2
    gib = (7 * block) / 2**30
    engine = f"{{gpu_memory_gib: {gib:.12f}, memory_utilization: 1.0, activation_gib: 0, max_model_len: 16}}"
    text = CHAIN.replace("{gpu_memory_gib: 8, max_model_len: 32}", engine)
    assert planner(text).steps[-1].engines
    with pytest.raises(PreflightError, match="not one sequence of 16 tokens fits"):
        planner(text.replace("  - prune: depth\n    with: {layers: 1, criterion: greedy}\n", ""))


def test_the_estimate_counts_passes_and_the_smaller_model(tmp_path: Path) -> None:
    facts = facts_of(Checkpoint(make_model(tmp_path / "model", layers=4, tokenizer=False)))
    windows = (8, 32)
    one = facts.forward(8 * 32, 32, 8 * 32, head=True).operations
    influence = Depth(layers=1).estimate(facts, facts, windows)
    assert influence.operations == pytest.approx(2 * one)
    greedy = Depth(layers=1, criterion="greedy").estimate(facts, facts, windows)
    head = replace(facts, blocks=()).forward(8 * 32, 32, 8 * 32, head=True).operations
    # 4 layers once, then 3 + 2 + 1 + 0 of them behind the candidates; logits five times.
    assert greedy.operations == pytest.approx((one - head) * (1 + 6 / 4) + 5 * head)
    assert greedy.memory_bytes > influence.memory_bytes > facts.float32_bytes

    left = facts_of(with_blocks(Checkpoint(tmp_path / "model"), (0, 1, 3)))
    assert len(left.blocks) == 3
    real = facts_of(Checkpoint(make_model(tmp_path / "shallow", layers=3, tokenizer=False)))
    assert left.parameters == real.parameters
    assert left.stored_bytes == pytest.approx(real.stored_bytes, rel=0.02)
