"""Scales of an fp8 KV cache: what they are, where they are stored, who still loads the model, and who is refused.

Shape legend: N = windows, T = tokens of a window, H = KV heads, D = channels of a head, O = out features.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from orchestrator.artifact import ArtifactStore
from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError, PreflightError, StepError
from orchestrator.export import ModelWriter, kv_scales_of, save_model
from orchestrator.home import Settings
from orchestrator.invariants import check_artifact
from orchestrator.kv_scales import (
    KV_CACHE_SCHEME,
    has_kv_scales,
    kv_scale_names,
    read_kv_scales,
    scale_tensors,
)
from orchestrator.method import Context, Invariant, ModelMethod, ModelResult, Stage
from orchestrator.model import quiet
from orchestrator.plan import make_plan
from orchestrator.plugins import InstalledMethod, Methods, Origin, discover
from orchestrator.quantized import quantization_config
from orchestrator.run import run_locally
from orchestrator_quantization import KVScales
from orchestrator_quantization.kv_scales import attentions_of
from tests.test_gguf import Builder, build, export
from tests.test_run import Watcher
from tests.tiny import edit_config, make_model, make_tokens

__all__ = ["build"]  # a fixture
FLOAT8_MAX = 448.0
MEASURED = "  - quantize: kv_scales\n"
CALIBRATED = "  - calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 32}\n"
BEFORE = {  # what a model may have gone through before
    "dense": "",
    "wanda": "  - prune: wanda\n    with: {pattern: '2:4'}\n",
    "gptq": "  - quantize: gptq\n    with: {num_bits: 4, group_size: 32}\n",
    "asymmetric": "  - quantize: rtn\n    with: {num_bits: 3, group_size: 32, symmetric: false}\n",
    "fp8": "  - quantize: fp8\n",
    "smoothquant": "  - quantize: smoothquant\n    with: {activations: static}\n",
    "mixed": "  - quantize: mixed\n    with: {bits_per_weight: 5.5, num_bits: [2, 4, 8], group_size: 32}\n",
}


@cache
def methods() -> Methods:
    return discover()


def context(checkpoint: Checkpoint, tokens_NT: torch.Tensor | None, scratch: Path) -> Context:
    calibration = None if tokens_NT is None else CalibrationSet(tokens_NT, {})
    return Context(0, checkpoint, calibration, scratch, checkpoint=checkpoint)


def measure(checkpoint: Checkpoint, tokens_NT: torch.Tensor, scratch: Path) -> ModelResult:
    return KVScales().apply(checkpoint.load(), context(checkpoint, tokens_NT, scratch))


def reference(checkpoint: Checkpoint, tokens_NT: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The scales in float64, from the outputs of the projections and norms, rotated here."""
    model: Any = checkpoint.load(torch.float64)
    config = model.config
    heads, width = config.num_key_value_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    frequency_D = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle_TD = torch.outer(torch.arange(tokens_NT.shape[1], dtype=torch.float64), frequency_D).repeat(1, 2)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("k_proj", "v_proj", "k_norm"):
            module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
    with torch.no_grad():
        model(tokens_NT)
    scales = {}
    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        key_NTHD = seen.get(f"{attention}.k_norm", seen[f"{attention}.k_proj"]).unflatten(-1, (-1, width))
        if f"{attention}.k_norm" in seen:
            key_NTHD = seen[f"{attention}.k_norm"]
        assert key_NTHD.shape[2:] == (heads, width)
        one, other = key_NTHD.chunk(2, dim=-1)
        cos_THD, sin_THD = angle_TD.cos()[:, None], angle_TD.sin()[:, None]
        rotated_NTHD = key_NTHD * cos_THD + torch.cat((-other, one), -1) * sin_THD
        absmax = (float(rotated_NTHD.abs().max()), float(seen[f"{attention}.v_proj"].abs().max()))
        scales[attention] = (absmax[0] / FLOAT8_MAX, absmax[1] / FLOAT8_MAX)
    return scales


def strict_stock_logits(folder: Path, tokens_NT: torch.Tensor) -> torch.Tensor:
    """What stock Transformers makes of a folder; but for the scales, every tensor must have its place."""
    with quiet(), torch.no_grad():
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        unexpected = {name for name in loading.pop("unexpected_keys") if not name.endswith(("k_scale", "v_scale"))}
        assert not unexpected and not any(loading.values())
        logits: torch.Tensor = model(tokens_NT).logits
    return logits


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"kv_heads": 2}),  # GQA
        ("llama", {"kv_heads": 1}),  # MQA
        ("llama", {"kv_heads": 4}),  # MHA
        ("qwen2", {}),  # a bias of the keys, sliding windows in the last layers
        ("qwen3", {}),  # norms of queries and keys, heads wider than hidden_size / heads
        ("mistral", {}),  # sliding windows everywhere
    ],
)
def test_scales_are_those_of_an_independent_reference(
    architecture: str, options: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture, dtype=torch.float32, **options))
    tokens_NT = make_tokens(sequences=70, length=32)  # two batches
    found = measure(checkpoint, tokens_NT, tmp_path).kv_scales
    expected = reference(checkpoint, tokens_NT)
    assert list(found) == [f"model.layers.{layer}.self_attn" for layer in range(3)] == list(expected)
    for attention, pair in expected.items():
        assert found[attention] == pytest.approx(pair, rel=2e-5)


def test_metrics_are_the_largest_numbers_and_bfloat16_is_measured_as_it_is_served(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    tokens_NT = make_tokens()
    result = measure(checkpoint, tokens_NT, tmp_path)
    for layer, (attention, pair) in enumerate(reference(checkpoint, tokens_NT).items()):
        assert result.kv_scales[attention] == pytest.approx(pair, rel=0.03)
        k_absmax = result.metrics[f"k_absmax_{layer}"]
        assert result.kv_scales[attention][0] == k_absmax / FLOAT8_MAX
        assert k_absmax == torch.tensor(k_absmax, dtype=torch.bfloat16).item()
    assert len(result.metrics) == 2 * 3


def test_scales_do_not_depend_on_threads_or_on_how_windows_fall_into_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32))
    tokens_NT = make_tokens(sequences=12, length=32)
    before = torch.get_num_threads()
    found = []
    for workers in (1, 3):
        monkeypatch.setattr("orchestrator_quantization.kv_scales._BATCH_TOKENS", 64)
        monkeypatch.setattr("orchestrator_quantization.kv_scales._workers", lambda count=workers: count)
        found.append(measure(checkpoint, tokens_NT, tmp_path).kv_scales)
    assert found[0] == found[1]
    assert torch.get_num_threads() == before
    backwards = measure(checkpoint, tokens_NT.flip(0), tmp_path).kv_scales
    assert backwards == found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv-scales")
    make_model(folder / "model", dtype=torch.float32)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return folder


def specification(folder: Path, steps: str, name: str = "spec") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"version: 1\nname: kv\nmodel: {{id: model}}\nsteps:\n{steps}", encoding="utf-8")
    return path


def run(place: Path, steps: str, tracking_uri: str) -> tuple[dict[str, Any], list[Any]]:
    """The run's document, and the artifacts of its steps."""
    settings = Settings(place / "home", tracking_uri)
    document = run_locally(specification(place, steps), methods(), settings, Watcher()).document()
    store = ArtifactStore(settings.home)
    return document, [store.find(step["artifact"]["digest"]) for step in document["steps"] if step["artifact"]]


@pytest.mark.parametrize("before", BEFORE)
def test_scales_are_stored_beside_what_was_there_and_stock_transformers_computes_as_before(
    before: str, place: Path, tracking_uri: str
) -> None:
    document, artifacts = run(place, CALIBRATED + BEFORE[before] + MEASURED, tracking_uri)
    input_path = artifacts[-2].path if BEFORE[before] else place / "model"
    given, made = Checkpoint(input_path), Checkpoint(artifacts[-1].path)
    old, new = (load_file(checkpoint.path / "model.safetensors") for checkpoint in (given, made))
    names = {f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(3) for kind in "kv"}
    assert new.keys() - old.keys() == names and old.keys() <= new.keys()
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype and torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8))
    for name in names:
        assert new[name].shape == (1,) and new[name].dtype == torch.float32
    calibration = CalibrationSet.load(artifacts[0].path)
    if given.schemes() == {}:
        for attention, pair in reference(given, calibration.tokens_NT).items():
            assert read_kv_scales(made)[attention] == pytest.approx(pair, rel=2e-5)

    entry = made.config["quantization_config" if given.is_quantized else "compression_config"]
    assert entry["kv_cache_scheme"] == KV_CACHE_SCHEME and entry["quant_method"] == "compressed-tensors"
    assert made.schemes() == given.schemes() and made.is_quantized == given.is_quantized
    if given.is_quantized:
        assert given.config["quantization_config"].items() <= entry.items()
        seen = CompressedTensorsConfig.from_dict(entry)  # by Transformers, which is not to round its own cache
        assert seen.dequantize or seen.quantization_config.kv_cache_scheme is None
    else:
        assert entry["config_groups"] == {} and "quantization_config" not in made.config

    kept, facts = ({} if not BEFORE[before] else artifacts[-2].manifest["invariants"]), artifacts[-1].manifest
    assert facts["invariants"] == {**kept, "kv_scales": {**KV_CACHE_SCHEME, "layers": 3}}
    tokens_NT = make_tokens(2)
    assert torch.equal(strict_stock_logits(made.path, tokens_NT), strict_stock_logits(given.path, tokens_NT))
    with torch.no_grad():
        assert torch.equal(made.load()(tokens_NT).logits, given.load()(tokens_NT).logits)
    again, _ = run(place, CALIBRATED + BEFORE[before] + MEASURED, tracking_uri)
    assert all(step["cached"] for step in again["steps"])
    assert [step["artifact"] for step in again["steps"]] == [step["artifact"] for step in document["steps"]]


def test_the_same_specification_gives_the_same_bytes(place: Path, tmp_path: Path, tracking_uri: str) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "text.txt", tmp_path / "text.txt")
    steps = CALIBRATED + BEFORE["gptq"] + MEASURED
    here, there = (run(folder, steps, tracking_uri)[0]["steps"][-1] for folder in (place, tmp_path))
    assert here["artifact"]["digest"] == there["artifact"]["digest"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            CALIBRATED + MEASURED + BEFORE["gptq"],
            "quantize gptq would destroy the kv_scales that quantize kv_scales established",
        ),
        (CALIBRATED + MEASURED + BEFORE["wanda"], "put prune wanda before quantize kv_scales"),
        (CALIBRATED + MEASURED + "  - prune: depth\n    with: {layers: 1}\n", "would destroy the kv_scales"),
        (CALIBRATED + MEASURED + MEASURED, "a model is quantized once; remove one of the two"),
        (MEASURED, "quantize kv_scales needs a calibration set"),
    ],
)
def test_chains_that_lose_scales_or_have_nothing_to_measure_on_are_refused(
    steps: str, message: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrchestratorError) as caught:
        make_plan(specification(place, steps, "refused"), methods(), tmp_path / "home")
    assert message in str(caught.value.problems)


CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64},
    "gpt_neox": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32},
    "deepseek_v3": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "vocab_size": 64,
    },
    "qwen3_next": {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64},
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt2", "not every block of a 'gpt2' model has its attention under the name self_attn"),
        ("gpt_neox", "not every block of a 'gpt_neox' model"),
        ("deepseek_v3", "latent attention"),
        ("qwen3_next", "layers of type linear_attention, which keep no keys and values"),
    ],
)
def test_models_that_keep_something_else_are_refused_by_name(kind: str, message: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))
    with pytest.raises(StepError, match=message):
        KVScales().check_model(model)


def test_plan_refuses_such_a_model_before_any_step(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "gpt2")
    (tmp_path / "text.txt").write_text("the quick brown fox. " * 200, encoding="utf-8")
    with pytest.raises(PreflightError, match="self_attn, where engines look for scales"):
        make_plan(specification(tmp_path, CALIBRATED + MEASURED), methods(), tmp_path / "home")


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "phi3", "opt", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_other_architectures_are_measured_and_stay_loadable(architecture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture, dtype=torch.float32))
    model = checkpoint.load()
    names = attentions_of(model)
    result = KVScales().apply(model, context(checkpoint, make_tokens(), tmp_path))
    assert list(result.kv_scales) == list(names.values())
    save_model(result.model, checkpoint, tmp_path / "out", kv_scales=result.kv_scales)
    made = Checkpoint(tmp_path / "out")
    assert kv_scale_names(made) == made.tensors.keys() - checkpoint.tensors.keys()
    tokens_NT = make_tokens(2)
    logits = strict_stock_logits(made.path, tokens_NT)
    assert torch.equal(logits, strict_stock_logits(checkpoint.path, tokens_NT))
    with torch.no_grad():
        assert torch.equal(logits, made.load()(tokens_NT).logits)


@pytest.mark.parametrize(
    ("layer", "number", "message"),
    [
        ("model.layers.1.self_attn.v_proj", 0.0, "all values of model.layers.1.self_attn are zero"),
        ("model.layers.2.self_attn.k_proj", 0.0, "all keys of model.layers.2.self_attn are zero"),
        ("model.layers.2.self_attn.k_proj", float("nan"), "the keys of model.layers.2.self_attn are not finite"),
        ("model.layers.0.self_attn.v_proj", float("inf"), "the values of model.layers.0.self_attn are not finite"),
    ],
)
def test_dead_and_overflowing_layers_are_named(layer: str, number: float, message: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    model = checkpoint.load()
    nn.init.constant_(model.get_submodule(layer).weight, number)
    with pytest.raises(StepError, match=message):
        KVScales().apply(model, context(checkpoint, make_tokens(), tmp_path))


def test_without_calibration_tokens_nothing_is_measured(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    with pytest.raises(StepError, match="no calibration tokens"):
        KVScales().apply(checkpoint.load(), context(checkpoint, None, tmp_path))


def test_a_layer_that_shares_the_cache_of_another_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    model: Any = checkpoint.load()
    model.model.layers[2].self_attn.layer_idx = 1
    model.model.layers[1].self_attn.register_module("self_attn", nn.Identity())
    model.model.layers[1].self_attn.self_attn.layer_idx = 2  # a name for layer 2, which puts nothing into the cache
    with pytest.raises(StepError, match="puts no keys and values of its own into the cache"):
        KVScales().apply(model, context(checkpoint, make_tokens(), tmp_path))


SCALES = {f"model.layers.{layer}.self_attn": (0.5 + layer, 0.25 + layer) for layer in range(3)}


@pytest.fixture
def scaled(tmp_path: Path) -> Checkpoint:
    """A dense bfloat16 model with scales."""
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    save_model(checkpoint.load(), checkpoint, tmp_path / "scaled", kv_scales=SCALES)
    return Checkpoint(tmp_path / "scaled")


def test_a_checkpoint_with_scales_alone_counts_as_dense(scaled: Checkpoint, tmp_path: Path) -> None:
    assert has_kv_scales(scaled.config) and not scaled.is_quantized and scaled.schemes() == {}
    assert scaled.dtype_name == "bfloat16" and read_kv_scales(scaled) == SCALES
    assert Checkpoint(tmp_path / "model").config.items() <= scaled.config.items()


def test_writers_keep_scales_as_they_are(scaled: Checkpoint, tmp_path: Path) -> None:
    writer = ModelWriter(Checkpoint(scaled.path, dtype="float16"), tmp_path / "copy")
    writer.finish()
    copy = Checkpoint(tmp_path / "copy")
    assert read_kv_scales(copy) == SCALES and copy.dtype_name == "float16"
    assert copy.config["compression_config"] == scaled.config["compression_config"]
    assert {copy.tensors[name].dtype for name in kv_scale_names(copy)} == {"F32"}


def test_a_quantized_copy_of_a_model_with_scales_says_so(scaled: Checkpoint, tmp_path: Path) -> None:
    from orchestrator.walk import walk
    from orchestrator_quantization import RTN

    writer = ModelWriter(scaled, tmp_path / "q", scheme=RTN(group_size=32).scheme())
    walk(scaled, RTN(group_size=32), None, writer)
    writer.finish()
    made = Checkpoint(tmp_path / "q")
    assert made.is_quantized and has_kv_scales(made.config) and read_kv_scales(made) == SCALES
    assert "compression_config" not in made.config


class Drop(ModelMethod):
    """Removes the first block and keeps the scales of the others."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "drop"
    paper: ClassVar[str] = "none: for the tests"
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.KV_SCALES})
    provides: ClassVar[frozenset[Invariant]] = frozenset()

    def blocks_removed(self) -> int:
        return 1

    def apply(self, model: Any, context: Context) -> ModelResult:
        model.model.layers = model.model.layers[1:]
        model.config.num_hidden_layers = 2
        return ModelResult(model, blocks=(1, 2))


class Forgetful(Drop):
    """Gives scales without saying so."""

    name: ClassVar[str] = "forgetful"
    keeps: ClassVar[frozenset[Invariant]] = frozenset()

    def blocks_removed(self) -> int:
        return 0

    def apply(self, model: Any, context: Context) -> ModelResult:
        return ModelResult(model, kv_scales=SCALES)


def test_a_method_that_keeps_scales_has_them_carried_to_the_new_numbers(place: Path, tracking_uri: str) -> None:
    found = discover()
    found.add(InstalledMethod(cls, Origin(cls.name, "tests", "0")) for cls in (Drop, Forgetful))
    settings = Settings(place / "home", tracking_uri)
    spec = specification(place, CALIBRATED + MEASURED + "  - prune: drop\n", "drop")
    steps = run_locally(spec, found, settings, Watcher()).document()["steps"]
    before, after = (ArtifactStore(settings.home).find(step["artifact"]["digest"]) for step in steps[-2:])
    scales = read_kv_scales(Checkpoint(before.path))
    assert read_kv_scales(Checkpoint(after.path)) == {
        f"model.layers.{layer}.self_attn": scales[f"model.layers.{layer + 1}.self_attn"] for layer in range(2)
    }
    assert after.manifest["invariants"]["kv_scales"]["layers"] == 2
    with pytest.raises(StepError, match="`provides` does not name kv_scales"):
        run_locally(specification(place, "  - prune: forgetful\n", "forgetful"), found, settings, Watcher())


def test_lost_changed_and_stale_scales_are_found(scaled: Checkpoint, tmp_path: Path) -> None:
    plain, kept = Checkpoint(tmp_path / "model"), {"kv_scales": {}}
    facts = check_artifact(plain, scaled, {}, claims={"kv_scales": {}})
    assert facts == {"kv_scales": {**KV_CACHE_SCHEME, "layers": 3}}
    assert check_artifact(scaled, scaled, kept) == facts
    with pytest.raises(StepError, match="no scales of a KV cache, though it should"):
        check_artifact(scaled, plain, kept)
    with pytest.raises(StepError, match="no scales of a KV cache, though it should"):
        check_artifact(plain, plain, {}, claims={"kv_scales": {}})
    with pytest.raises(StepError, match="`provides` does not name kv_scales"):
        check_artifact(plain, scaled, {})
    other = {**SCALES, "model.layers.1.self_attn": (1.5, 1.0)}
    save_model(plain.load(), plain, tmp_path / "other", kv_scales=other)
    with pytest.raises(StepError, match=r"KV scales of model.layers.1.self_attn are \(1.5, 1.0\), not \(1.5, 1.25\)"):
        check_artifact(scaled, Checkpoint(tmp_path / "other"), kept)
    with pytest.raises(StepError, match=r"model.layers.7.self_attn is given scales .* no such module"):
        save_model(plain.load(), plain, tmp_path / "none", kv_scales={"model.layers.7.self_attn": (1.0, 1.0)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.self_attn.v_scale": None}, "model.layers.1.self_attn has no v_scale"),
        ({"model.layers.1.self_attn.v_scale": torch.tensor([0.0])}, "v_scale is not one positive number"),
        ({"model.layers.1.self_attn.k_scale": torch.ones(2)}, "k_scale is not one positive number"),
    ],
)
def test_damaged_scales_are_named(changes: dict[str, torch.Tensor | None], message: str, scaled: Checkpoint) -> None:
    file = scaled.path / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})
    with pytest.raises(StepError, match=message):
        read_kv_scales(Checkpoint(scaled.path))


def test_a_source_that_has_scales_is_refused(scaled: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox. " * 200, encoding="utf-8")
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(scaled.path, tmp_path / "model")
    with pytest.raises(PreflightError, match="has scales of a KV cache already"):
        make_plan(specification(tmp_path, CALIBRATED + BEFORE["wanda"]), methods(), tmp_path / "home")


def test_names_are_taken_for_scales_only_if_config_json_speaks_of_them(scaled: Checkpoint) -> None:
    edit_config(scaled.path, compression_config=None)
    assert kv_scale_names(Checkpoint(scaled.path)) == set() and read_kv_scales(Checkpoint(scaled.path)) == {}


def test_scales_of_a_result_come_from_it_or_from_the_input_of_what_keeps_them(scaled: Checkpoint) -> None:
    model: Any = None
    given = {"model.layers.0.self_attn": (1.0, 2.0)}
    assert kv_scales_of(ModelResult(model, kv_scales=given), scaled) == given
    assert kv_scales_of(ModelResult(model), None) == {}
    assert kv_scales_of(ModelResult(model, blocks=(2,)), scaled) == {"model.layers.0.self_attn": (2.5, 2.25)}
    assert list(scale_tensors(given)) == ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]


def test_config_of_models_without_scales_is_as_it_was() -> None:
    from orchestrator_quantization import FP8, RTN

    for method in (FP8(), RTN()):
        entry = quantization_config({"a": method.scheme()}, ())
        assert not {"kv_cache_scheme", "quantization_config"} & entry.keys()
        with_scales = quantization_config({"a": method.scheme()}, (), kv_scales=True)
        assert entry.items() <= with_scales.items()
    json.dumps(with_scales)


def test_gguf_leaves_scales_out(build: Builder, tmp_path: Path) -> None:
    plain = build()
    save_model(plain.load(), plain, tmp_path / "scaled", kv_scales=SCALES)
    files = [export(model, tmp_path, type="f16")[0].read_bytes() for model in (plain, Checkpoint(tmp_path / "scaled"))]
    assert files[0] == files[1]


def test_estimate_is_some_work_and_less_memory_than_two_models(place: Path) -> None:
    from orchestrator.facts import facts_of

    facts = facts_of(Checkpoint(place / "model"))
    work = KVScales().estimate(facts, facts, (8, 32))
    assert work.operations > 0 and work.memory_bytes > 0
    assert KVScales().estimate(replace(facts, blocks=()), facts, (8, 32)).operations < work.operations


def test_dense_models_with_scales_in_the_form_of_others_are_read_too(scaled: Checkpoint, tmp_path: Path) -> None:
    entry = {**scaled.config["compression_config"], "quantization_status": "frozen"}  # as llm-compressor writes it
    edit_config(scaled.path, compression_config=None, quantization_config=entry)
    other = Checkpoint(scaled.path)
    assert not other.is_quantized and other.schemes() == {} and read_kv_scales(other) == SCALES
    tokens_NT = make_tokens(2)
    with torch.no_grad():
        assert torch.equal(other.load()(tokens_NT).logits, Checkpoint(tmp_path / "model").load()(tokens_NT).logits)
