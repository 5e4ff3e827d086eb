"""OpenVINO's form of a model is run by OpenVINO GenAI and compared with Transformers; what it cannot be is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.api import (
    Checkpoint,
    Context,
    ExportFacts,
    InputScheme,
    PreflightError,
    QuantScheme,
    SpecError,
    StepError,
)
from orchestrator_export import openvino, openvino_graph
from orchestrator_export.openvino import FAMILIES, OpenVINO
from orchestrator_quantization.rtn import RTN
from tests import tiny
from tests.test_gguf import CARRIED, compressed, whole_tokenizer
from tests.tiny import edit_config, make_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    """A function that makes a tiny checkpoint; keywords change its configuration beforehand."""
    monkeypatch.setattr(tiny, "VOCABULARY", 384)

    def get(architecture: str = "llama", dtype: torch.dtype = torch.float32, **entries: Any) -> Checkpoint:
        own = tiny._OWN_ENTRIES[architecture]
        changes = {**CARRIED.get(architecture, {}), **entries}
        monkeypatch.setitem(tiny._OWN_ENTRIES, architecture, lambda width, inner: {**own(width, inner), **changes})
        folder = tmp_path / architecture
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, architecture, dtype=dtype, tokenizer=False, layers=1)
        whole_tokenizer(folder)
        return Checkpoint(folder)

    return get


def export(model: Checkpoint, folder: Path, **parameters: Any) -> tuple[Path, Mapping[str, float]]:
    """Write below `folder`; return where, and what was measured."""
    target, scratch = folder / "out", folder / "scratch"
    for path in (target, scratch):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    measured = OpenVINO(**{"tokens": 64, **parameters}).write(model, target, {}, Context(0, model, None, scratch))
    return target, measured


def facts(model: Checkpoint, scheme: QuantScheme | None = None) -> ExportFacts:
    schemes = {layer.name: (scheme,) for layer in model.block_layers()} if scheme else {}
    return ExportFacts(model, frozenset(), schemes)


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_openvino_computes_what_transformers_computes(
    build: Callable[..., Checkpoint], tmp_path: Path, architecture: str
) -> None:
    model = build(architecture)
    OpenVINO().check(facts(model))
    target, measured = export(model, tmp_path)
    assert measured["kl_mean"] < 1e-6 and measured["top1_agreement"] == 1 and measured["greedy_shortfall"] < 1e-3
    assert {path.name for path in target.iterdir()} >= {
        "openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json",
    }  # fmt: skip
    assert measured["bytes"] == sum(path.stat().st_size for path in target.iterdir())


def test_variants_of_llama_are_carried(build: Callable[..., Checkpoint], tmp_path: Path) -> None:
    _, measured = export(build(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=32), tmp_path)
    assert measured["kl_mean"] < 1e-6


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        ({"num_bits": 4, "group_size": 32}, "i4"),
        ({"num_bits": 3, "group_size": 32, "symmetric": False}, "u4"),
        ({"num_bits": 8, "group_size": None}, "i8"),
        ({"num_bits": 8, "group_size": 32, "symmetric": False}, "u8"),
    ],
)
def test_a_grid_keeps_its_integers_and_scales(
    build: Callable[..., Checkpoint], tmp_path: Path, parameters: dict[str, Any], kind: str
) -> None:
    from openvino import Core

    dense = build(dtype=torch.bfloat16)
    method = RTN(**parameters)
    OpenVINO().check(facts(dense, method.scheme()))
    model = compressed(dense, method, tmp_path / "quantized")
    target, measured = export(model, tmp_path)
    assert measured["kl_mean"] < 1e-6
    assert measured[f"{kind}_matrices"] == 7
    integers = [
        node
        for node in Core().read_model(target / "openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() == kind
    ]
    layers = [node for node in integers if node.get_output_shape(0)[-1] > 1]
    assert len(layers) == 7
    share = (target / "openvino_model.bin").stat().st_size / dense.weight_bytes()
    assert share < (0.75 if kind[1:] == "4" else 0.95)


def test_the_same_model_gives_the_same_bytes(build: Callable[..., Checkpoint], tmp_path: Path) -> None:
    model = compressed(build(dtype=torch.bfloat16), RTN(num_bits=4, group_size=32), tmp_path / "quantized")
    first, _ = export(model, tmp_path / "a")
    second, _ = export(model, tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_sixteen_bits_stay_sixteen_bits(build: Callable[..., Checkpoint], tmp_path: Path) -> None:
    model = build(dtype=torch.bfloat16)
    target, measured = export(model, tmp_path)
    assert "f32_matrices" not in measured and measured["kl_mean"] < 1e-6
    assert (target / "openvino_model.bin").stat().st_size < 1.1 * model.weight_bytes()


def test_a_folder_that_is_another_model_is_never_left(
    build: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(build(dtype=torch.bfloat16), RTN(num_bits=4, group_size=32), tmp_path / "quantized")
    real = openvino_graph._grid

    def wrong(weight: Any) -> Any:
        return real(weight.__class__(weight.q_OI.flip(1), weight.scale_OG, weight.zero_point_OG, weight.scheme))

    monkeypatch.setattr(openvino_graph, "_grid", wrong)
    with pytest.raises(StepError, match="another model than Transformers"):
        export(model, tmp_path)
    assert not list((tmp_path / "out").iterdir())


def test_another_tokenizer_is_never_left(
    build: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = openvino._write_tokenizer

    def wrong(model: Checkpoint, folder: Path) -> None:
        path = model.path / "tokenizer.json"
        content = json.loads(path.read_text())
        whole = path.read_text()
        content["model"]["merges"] = content["model"]["merges"][:20]
        path.write_text(json.dumps(content))
        real(model, folder)
        path.write_text(whole)

    monkeypatch.setattr(openvino, "_write_tokenizer", wrong)
    with pytest.raises(StepError, match="OpenVINO's tokenizer makes"):
        export(build(), tmp_path)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("architecture", "entries", "said"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window of 8 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding window of 8 tokens"),
        ("gemma2", {}, "model type 'gemma2'"),
        ("mixtral", {}, "model type 'mixtral'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
    ],
)
def test_what_openvino_would_compute_otherwise_is_refused_while_planning(
    tmp_path: Path, architecture: str, entries: dict[str, Any], said: str
) -> None:
    model = Checkpoint(make_model(tmp_path / "model", architecture, tokenizer=False))
    edit_config(model.path, **entries)
    with pytest.raises(PreflightError, match=said):
        OpenVINO().check(facts(Checkpoint(model.path)))


def test_grids_that_it_cannot_hold_are_refused_while_planning(build: Callable[..., Checkpoint]) -> None:
    inputs = QuantScheme(num_bits=8, strategy="channel", group_size=None, input_activations=InputScheme(num_bits=8))
    with pytest.raises(SpecError, match="no place for quantized inputs"):
        OpenVINO().check(facts(build(), inputs))


def test_float16_that_does_not_hold_a_weight_is_refused(build: Callable[..., Checkpoint], tmp_path: Path) -> None:
    model = build(dtype=torch.bfloat16)
    tensors = load_file(model.path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, model.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StepError, match=r"float16 does not hold the weights of \S*layers\.0\.mlp\.up_proj"):
        export(Checkpoint(model.path), tmp_path, type="f16")
