"""GGUF files are run by llama.cpp itself and compared with Transformers; what they cannot carry is refused by name.

Shape legend: O = out features, I = in features, G = groups along I.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator import quickstart
from orchestrator.api import (
    Checkpoint,
    Context,
    ExportFacts,
    InputScheme,
    Invariant,
    OrchestratorError,
    PreflightError,
    QuantizedWeight,
    QuantScheme,
    SpecError,
    StepError,
    TensorReader,
    unpack,
)
from orchestrator.export import ModelWriter
from orchestrator.layer_method import LayerMethod
from orchestrator.walk import walk
from orchestrator_export import architectures, llama_cpp, vocabulary
from orchestrator_export.architectures import FAMILIES
from orchestrator_export.gguf import GGUF
from orchestrator_export.grids import as_blocks
from orchestrator_export.tensor_types import ModelFigures, matrix_type
from orchestrator_quantization.rtn import RTN
from tests import tiny
from tests.tiny import make_model

# What the tiny models of `tests.tiny` have that llama.cpp computes otherwise.
CARRIED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "qwen3_moe": {"mlp_only_layers": []},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "phi3": {"sliding_window": None},
    "gpt2": {},
    "gpt_neox": {},
}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
Builder = Callable[..., Checkpoint]


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that knows every byte, as those of published models do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(tiny._TEXT * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """A function that makes a tiny checkpoint with such a tokenizer; keywords change its configuration beforehand."""
    monkeypatch.setattr(tiny, "VOCABULARY", 384)

    def get(architecture: str = "llama", dtype: torch.dtype = torch.float32, **entries: Any) -> Checkpoint:
        own = tiny._OWN_ENTRIES[architecture]
        changes = {**CARRIED[architecture], **entries}
        sizes = {name: changes.pop(name) for name in ("tied", "hidden_size", "intermediate_size") if name in changes}
        monkeypatch.setitem(tiny._OWN_ENTRIES, architecture, lambda width, inner: {**own(width, inner), **changes})
        folder = tmp_path / architecture
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, architecture, dtype=dtype, tokenizer=False, **sizes)
        whole_tokenizer(folder)
        return Checkpoint(folder)

    return get


def export(
    model: Checkpoint, folder: Path, invariants: Mapping[str, Any] | None = None, **parameters: Any
) -> tuple[Path, Mapping[str, float]]:
    """Write a file below `folder`; return its path and what was measured."""
    target, scratch = folder / "out", folder / "scratch"
    for path in (target, scratch):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    method = GGUF(**{"tokens": 64, **parameters})
    measured = method.write(model, target, invariants or {}, Context(0, model, None, scratch))
    (path,) = target.iterdir()
    assert measured["bytes"] == path.stat().st_size
    return path, measured


def tensors_of(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Type and numbers of every tensor, as gguf-py reads them."""
    return {
        tensor.name: (tensor.tensor_type.name.lower(), gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


def facts(model: Checkpoint, scheme: QuantScheme | None = None, *, pruned: bool = False) -> ExportFacts:
    held = ({Invariant.GRID} if scheme else set()) | ({Invariant.ZEROS} if pruned else set())
    schemes = {layer.name: (scheme,) for layer in model.block_layers()} if scheme else {}
    return ExportFacts(model, frozenset(held), schemes)


def compressed(model: Checkpoint, method: LayerMethod, folder: Path) -> Checkpoint:
    writer = ModelWriter(model, folder, scheme=method.scheme())
    walk(model, method, None, writer)
    writer.finish()
    return Checkpoint(folder)


# Architectures.


def test_every_family_is_tried_here() -> None:
    assert CARRIED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", CARRIED)
def test_llama_cpp_computes_what_transformers_computes(build: Builder, tmp_path: Path, architecture: str) -> None:
    model = build(architecture)
    GGUF().check(facts(model))
    path, measured = export(model, tmp_path)
    assert path.name == "model-f32.gguf"
    assert measured["kl_median"] < 2e-5 and measured["top1_agreement"] > 0.95
    assert measured["changed_weights"] == 0 and measured["tokens"] == 64


@pytest.mark.parametrize(
    "entries",
    [
        {"tied": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-3},
    ],
    ids=lambda entries: next(iter(entries.values())) if isinstance(entries, str) else "-".join(entries),
)
def test_variants_of_llama_are_carried(build: Builder, tmp_path: Path, entries: dict[str, Any]) -> None:
    path, measured = export(build(**entries), tmp_path)
    assert measured["kl_mean"] < 2e-5
    assert ("output.weight" in tensors_of(path)) != bool(entries.get("tied"))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda patch: patch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], rotary=False)),
        lambda patch: patch.setattr(architectures.Carried, "rope_factors", lambda self: None),
        lambda patch: patch.setattr(architectures.Carried, "head_dim", property(lambda self: 8)),
    ],
    ids=["order of rows", "rope", "width of heads"],
)
@pytest.mark.parametrize("kind", ["auto", "q4_k_m"])
def test_a_file_that_is_another_model_is_never_left(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Any], None], kind: str
) -> None:
    model = build(rope_parameters=LLAMA3)
    mistake(monkeypatch)
    with pytest.raises(StepError, match=r"another model than Transformers|cannot use \S+.gguf"):
        export(model, tmp_path, type=kind)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("architecture", "entries", "named"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window of 8 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding window of 8"),
        ("phi3", {"sliding_window": 8}, "sliding window"),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rope type 'llama3'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "a rope on 0.5 of each head"),
        ("qwen3", {"attention_bias": True}, "biases in the attention of qwen3"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar: 24, for which llama.cpp takes 32"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "blocks without experts"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob: False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_while_planning(
    build: Builder, architecture: str, entries: dict[str, Any], named: str
) -> None:
    with pytest.raises(PreflightError, match=named):
        GGUF().check(facts(build(architecture, **entries)))


def test_an_unknown_architecture_is_refused_with_those_that_are_carried(tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path / "model", "opt"))
    with pytest.raises(PreflightError, match=r"'opt' is not written as GGUF .*gemma2.*llama.*qwen3"):
        GGUF().check(facts(model))


def test_a_tensor_without_a_place_is_refused(build: Builder) -> None:
    model = build()
    tensors = load_file(model.path / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)
    save_file(tensors, model.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match=r"no place for model\.layers\.0\.self_attn\.sinks"):
        GGUF(type="q4_k_m").check(facts(Checkpoint(model.path), pruned=True))
    with pytest.raises(OrchestratorError, match=r"no place for model\.layers\.0\.self_attn\.sinks"):
        export(Checkpoint(model.path), model.path.parent)


# Types.


@pytest.mark.parametrize(
    ("file_type", "counts"),
    [  # what llama.cpp reports of published files of Llama 2 7B (MHA), Llama 3 8B (GQA)
        ("q4_k_m", {"q4_k": 193, "q6_k": 33}),
        ("q4_k_s", {"q4_k": 217, "q5_k": 8, "q6_k": 1}),
        ("q5_k_m", {"q5_k": 193, "q6_k": 33}),
        ("q3_k_m", {"q3_k": 129, "q4_k": 92, "q5_k": 4, "q6_k": 1}),
        ("q6_k", {"q6_k": 226}),
        ("q8_0", {"q8_0": 226}),
        ("q4_0", {"q4_0": 225, "q6_k": 1}),
    ],
)
@pytest.mark.parametrize("kv_heads", [8, 32])
def test_mixtures_are_those_of_llama_quantize(file_type: str, counts: dict[str, int], kv_heads: int) -> None:
    model = ModelFigures(layers=32, heads=32, kv_heads=kv_heads, experts=0, tied=False)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{part}.weight" for layer in range(32) for part in parts]
    names += ["token_embd.weight", "output.weight"]
    assert Counter(matrix_type(name, 4096, file_type, model) for name in names) == counts


@pytest.mark.parametrize("file_type", ["q5_0", "q4_1", "q2_k", "q3_k_l", "q5_k_s", "iq4_xs"])
def test_llama_cpp_quantizes_and_runs_every_type(build: Builder, tmp_path: Path, file_type: str) -> None:
    model = build(dtype=torch.bfloat16, hidden_size=256, intermediate_size=256)
    path, measured = export(model, tmp_path, type=file_type)
    assert measured["changed_weights"] > 0.5 and measured["fallback_matrices"] == 0
    assert 0 < measured["kl_mean"] < 3
    kinds = {kind for name, (kind, _) in tensors_of(path).items() if name.startswith("blk.")}
    assert file_type.removesuffix("_l").removesuffix("_s") in kinds
    (number,) = gguf.GGUFReader(path).fields["general.file_type"].parts[-1]
    assert gguf.LlamaFileType(int(number)).name.lower() == f"mostly_{file_type}"


def test_rows_that_are_no_whole_blocks_fall_back_as_in_llama_cpp_and_are_counted(
    build: Builder, tmp_path: Path
) -> None:
    path, measured = export(build(intermediate_size=144), tmp_path, type="q4_k_m")
    kinds = {name: kind for name, (kind, _) in tensors_of(path).items()}
    assert kinds["blk.0.ffn_up.weight"] == "q5_0"  # rows of 64: no block of 256
    assert kinds["blk.0.ffn_down.weight"] == "f16"  # rows of 144: no block of 32 either
    assert kinds["blk.0.attn_norm.weight"] == "f32"
    assert measured["fallback_matrices"] == 23  # all of them


def test_bigger_numbers_than_float16_holds_are_refused(build: Builder, tmp_path: Path) -> None:
    model = build(dtype=torch.bfloat16)
    tensors = load_file(model.path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, model.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StepError, match=r"f16 cannot carry model\.layers\.1\.mlp\.up_proj\.weight: \S+ is beyond"):
        export(Checkpoint(model.path), tmp_path, type="f16")


# Grids.


@pytest.mark.parametrize(
    ("parameters", "kind"),
    [
        ({"num_bits": 4, "group_size": 32}, "q4_0"),
        ({"num_bits": 4, "group_size": 64}, "q4_0"),
        ({"num_bits": 3, "group_size": None}, "q4_0"),
        ({"num_bits": 5, "group_size": 32}, "q5_0"),
        ({"num_bits": 8, "group_size": None}, "q8_0"),
    ],
)
def test_a_grid_keeps_its_integers_and_scales(
    build: Builder, tmp_path: Path, parameters: dict[str, Any], kind: str
) -> None:
    dtype = torch.float16 if kind == "q8_0" else torch.bfloat16
    dense = build(dtype=dtype)
    method = RTN(**parameters)
    model = compressed(dense, method, tmp_path / "quantized")
    GGUF().check(facts(dense, method.scheme()))
    path, measured = export(model, tmp_path)
    assert path.name == f"model-{kind}.gguf" and measured["changed_weights"] == 0 and measured["kl_mean"] < 0.02
    scheme = method.scheme()
    assert scheme is not None
    held = tensors_of(path)
    assert held["token_embd.weight"][0] == ("bf16" if dtype == torch.bfloat16 else "f16")
    with TensorReader(model) as read:
        for layer, place in (("mlp.down_proj", "ffn_down"), ("self_attn.k_proj", "attn_k")):
            weight = unpack(read, f"model.layers.1.{layer}", scheme)
            width = scheme.group_width(weight.q_OI.shape[1])
            wanted = (weight.q_OI.double() * weight.scale_OG.double().repeat_interleave(width, 1)).numpy()
            if place == "attn_k":  # two KV heads of 16 rows: llama.cpp wants rows 0, 8, 1, 9, ...
                wanted = wanted[np.arange(32).reshape(2, 2, 8).swapaxes(1, 2).reshape(-1)]
            assert held[f"blk.1.{place}.weight"][0] == kind
            np.testing.assert_array_equal(held[f"blk.1.{place}.weight"][1], wanted)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_neox", "phi3"])
def test_grids_of_experts_and_fused_layers_are_carried(build: Builder, tmp_path: Path, architecture: str) -> None:
    model = compressed(build(architecture, torch.bfloat16), RTN(num_bits=8, group_size=32), tmp_path / "quantized")
    path, measured = export(model, tmp_path)
    assert measured["changed_weights"] == 0 and measured["kl_median"] < 0.05
    kinds = {name: kind for name, (kind, _) in tensors_of(path).items() if name.startswith("blk.1.ffn_down")}
    assert {kind for name, kind in kinds.items() if name.endswith("weight")} == {"q8_0"}


def test_a_grid_as_float16_keeps_its_points(build: Builder, tmp_path: Path) -> None:
    method = RTN(num_bits=4, group_size=16, symmetric=False)
    model = compressed(build(dtype=torch.bfloat16), method, tmp_path / "quantized")
    GGUF(type="f16").check(facts(model, method.scheme()))
    _, measured = export(model, tmp_path, type="f16")
    assert measured["kl_mean"] < 2e-5 and measured["changed_weights"] < 1e-3


def test_other_matrices_of_a_grid_are_quantized_if_asked(build: Builder, tmp_path: Path) -> None:
    model = compressed(build(dtype=torch.bfloat16), RTN(num_bits=4, group_size=32), tmp_path / "quantized")
    path, measured = export(model, tmp_path, type="q8_0")
    held = tensors_of(path)
    assert held["output.weight"][0] == held["blk.0.ffn_up.weight"][0] == "q8_0"
    assert 0 < measured["changed_weights"] < 0.5  # embeddings and output; no layer
    exact, _ = export(model, tmp_path / "exact")
    np.testing.assert_array_equal(held["blk.0.ffn_up.weight"][1], tensors_of(exact)["blk.0.ffn_up.weight"][1])


def _weight(scale: float, zero: int | None, num_bits: int = 4) -> QuantizedWeight:
    scheme = QuantScheme(num_bits=num_bits, symmetric=zero is None, group_size=32)
    q_OI = torch.arange(64, dtype=torch.int64).remainder(1 << num_bits).sub(1 << (num_bits - 1)).to(torch.int8)
    zero_OG = None if zero is None else torch.full((1, 2), zero, dtype=torch.int8)
    return QuantizedWeight(q_OI.view(1, 64), torch.full((1, 2), scale), zero_OG, scheme)


@pytest.mark.parametrize(
    ("kind", "zero", "bits"),
    [("q4_0", None, 4), ("q4_1", 3, 4), ("q4_1", -8, 4), ("q5_0", None, 5), ("q5_0", None, 4), ("q8_0", None, 8)],
)
def test_blocks_stand_for_the_grid(kind: str, zero: int | None, bits: int) -> None:
    weight = _weight(0.0625, zero, bits)
    packed = as_blocks(weight, kind, "layer")
    held = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(held, weight.dequantize(torch.float32).numpy())
    if zero is not None:  # what is zero on the grid is zero in the file
        assert (held[weight.q_OI.numpy() == zero] == 0).all() and (held == 0).any()


@pytest.mark.parametrize(
    ("scale", "zero", "named"),
    [
        (0.1, None, "float16 does not hold the scale 0.1"),
        (2.0**-26, None, "scale 1.490"),
        (70000.0, None, "scale 70000"),
        (1.0009765625, 7, "the minimum -15.0146484"),
    ],
)
def test_scales_that_float16_does_not_hold_are_refused(scale: float, zero: int | None, named: str) -> None:
    with pytest.raises(StepError, match=named):
        as_blocks(_weight(scale, zero), "q4_0" if zero is None else "q4_1", "layer")


@pytest.mark.parametrize(
    ("kind", "scheme", "named"),
    [
        ("q4_k_m", QuantScheme(num_bits=4, group_size=32), "would quantize the symmetric 4-bit int grid of model"),
        ("q4_0", QuantScheme(num_bits=8, group_size=32), "would quantize the symmetric 8-bit int grid of model"),
        ("auto", QuantScheme(num_bits=4, group_size=16), "groups of 16 weights are no whole number of blocks"),
        (
            "auto",
            QuantScheme(num_bits=4, group_size=32, symmetric=False),
            r"the asymmetric 4-bit int grid of model\S+: q4_1",
        ),
        (
            "auto",
            QuantScheme(num_bits=8, type="float", strategy="channel", group_size=None),
            "symmetric 8-bit float grid",
        ),
        ("auto", QuantScheme(num_bits=8, group_size=32, symmetric=False), "the asymmetric 8-bit int grid"),
    ],
)
def test_grids_that_a_type_cannot_carry_are_refused_while_planning(
    build: Builder, kind: Any, scheme: QuantScheme, named: str
) -> None:
    with pytest.raises(SpecError, match=named) as caught:
        GGUF(type=kind).check(facts(build(dtype=torch.bfloat16), scheme))
    assert "f16" in str(caught.value)  # the way out


@pytest.mark.parametrize("kind", ["auto", "f16"])
def test_quantized_inputs_are_refused_while_planning(build: Builder, kind: Any) -> None:
    scheme = QuantScheme(num_bits=8, strategy="channel", group_size=None, input_activations=InputScheme())
    with pytest.raises(SpecError, match=r"no place for quantized inputs, which model\.layers\.0.* has.*weights only"):
        GGUF(type=kind).check(facts(build(dtype=torch.bfloat16), scheme))


def test_layers_on_different_grids_each_get_the_type_that_holds_theirs(build: Builder, tmp_path: Path) -> None:
    dense = build(dtype=torch.bfloat16)
    small, large = RTN(num_bits=4, group_size=32), RTN(num_bits=8, group_size=32)
    methods = {layer.name: large if "self_attn" in layer.name else small for layer in dense.block_layers()}
    schemes = {name: method.scheme() for name, method in methods.items()}
    writer = ModelWriter(dense, tmp_path / "mixed", scheme={name: s for name, s in schemes.items() if s})
    walk(dense, small, None, writer, methods=methods)
    writer.finish()
    path, measured = export(Checkpoint(tmp_path / "mixed"), tmp_path)
    kinds = {name: kind for name, (kind, _) in tensors_of(path).items()}
    assert (kinds["blk.2.attn_v.weight"], kinds["blk.2.ffn_up.weight"]) == ("q8_0", "q4_0")
    assert path.name == "model-q4_0.gguf" and measured["changed_weights"] == 0


def test_scales_of_a_float32_model_are_refused_while_planning(build: Builder) -> None:
    with pytest.raises(SpecError, match=r"a float32 model has them in its own dtype.*dtype to bfloat16"):
        GGUF().check(facts(build(), QuantScheme(num_bits=4, group_size=32)))


# Zeros.


@pytest.fixture
def pruned(build: Builder) -> Checkpoint:
    model = build(dtype=torch.bfloat16, hidden_size=256, intermediate_size=256)
    tensors = load_file(model.path / "model.safetensors")
    for layer in model.block_layers():
        weight_XM = tensors[f"{layer.name}.weight"].view(-1, 4)
        weight_XM.scatter_(1, weight_XM.abs().argsort(dim=1)[:, :2], 0.0)
    save_file(tensors, model.path / "model.safetensors", {"format": "pt"})
    return Checkpoint(model.path)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q5_0", "q6_k", "q3_k_s"])
def test_pruned_zeros_are_zeros_in_the_file(pruned: Checkpoint, tmp_path: Path, kind: Any) -> None:
    GGUF(type=kind).check(facts(pruned, pruned=True))
    path, _ = export(pruned, tmp_path, {"zeros": {"pattern": "2:4"}}, type=kind)
    held = tensors_of(path)
    stored = load_file(pruned.path / "model.safetensors")
    zeros_OI = (stored["model.layers.0.mlp.down_proj.weight"] == 0).numpy()
    assert zeros_OI.mean() >= 0.5
    assert not held["blk.0.ffn_down.weight"][1][zeros_OI].any()


@pytest.mark.parametrize("kind", ["q4_k_m", "q3_k_m", "q5_1", "iq4_nl"])
def test_types_that_lose_zeros_are_refused_while_planning_and_again_when_writing(
    pruned: Checkpoint, tmp_path: Path, kind: Any
) -> None:
    with pytest.raises(SpecError, match=r"does not keep the zeros that pruning made.*q8_0, q4_0 or f16"):
        GGUF(type=kind).check(facts(pruned, pruned=True))
    with pytest.raises(StepError, match="does not keep the zeros of model"):
        export(pruned, tmp_path, {"zeros": {"pattern": "2:4"}}, type=kind)


# Tokenizers.


def _sentencepiece_like(folder: Path) -> None:
    """BPE with byte fallback and no pre-tokenizer, as Llama 2 has."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    trained.train_from_iterator([word for text in tiny._TEXT for word in text.split()] * 3, trainer)
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.add_special_tokens(special[:3])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )
    fast.save_pretrained(folder)


def test_bpe_with_byte_fallback_gives_the_same_tokens(build: Builder, tmp_path: Path) -> None:
    model = build()
    _sentencepiece_like(model.path)
    found = vocabulary.find_vocabulary(model, 384, tmp_path)
    assert (found.kind, found.prefix, found.add_bos, found.add_eos) == ("llama", True, True, False)
    assert found.special["add_bos_token_id"] == 1 and found.special["add_unk_token_id"] == 0
    assert found.tokens[383] == "[PAD383]" and found.types[383] == gguf.TokenType.UNUSED


def test_the_cut_of_text_is_found_by_trying(build: Builder, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    model = build()
    path = model.path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    assert vocabulary.find_vocabulary(model, 384, tmp_path).cut == "gpt-2"
    cut = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    cut += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated"), byte_level])
    tokenizer.save(str(path))
    assert vocabulary.find_vocabulary(model, 384, tmp_path).cut == "llama-bpe"


def test_a_tokenizer_that_llama_cpp_cuts_otherwise_is_refused(
    build: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    monkeypatch.setattr(vocabulary, "CUTS", vocabulary.CUTS[:4])  # the others would be refused just so, in more time
    model = build()
    path = model.path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("e", "isolated"), byte_level])
    tokenizer.save(str(path))
    with pytest.raises(StepError, match=r"in none of its ways.*for instance, .* gives \[.*\] instead of \["):
        export(model, tmp_path)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [None, '{"model": {"type": "WordPiece", "vocab": {}}}', "{"])
def test_a_tokenizer_that_is_no_bpe_is_refused_while_planning(build: Builder, content: str | None) -> None:
    model = build()
    path = model.path / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=r"cannot carry the tokenizer: .*tokenizer\.json"):
        GGUF().check(facts(model))


# The rest.


@pytest.mark.parametrize("missing", ["gguf", "xllamacpp"])
def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        PreflightError, match=rf"needs the package {missing}; pip install 'compression-orches.*\[gguf\]'"
    ):
        GGUF().preflight()


def test_llama_cpp_that_dies_is_an_error_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(StepError, match=r"llama\.cpp \(xllamacpp \S+\) cannot use model\.gguf: .*(error|fail)"):
        llama_cpp.logits(tmp_path / "model.gguf", np.zeros((1, 4), np.int32), tmp_path)


CONTINUE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 1
answer = xllamacpp.Server(params).handle_completions({"prompt": sys.argv[2], "max_tokens": 24, "temperature": 0.0})
sys.stdout.write("ANSWER:" + answer["choices"][0]["text"])
sys.stdout.flush()
import os; os._exit(0)
"""


@pytest.mark.parametrize(("kind", "ratio"), [("auto", 1.0), ("q4_k_m", 0.4)])
def test_the_quickstart_model_goes_on_as_in_transformers(tmp_path: Path, kind: str, ratio: float) -> None:
    """Through xllamacpp's own server, as a user of the file would."""
    model = Checkpoint(Path(str(quickstart.__file__)).parent / "model")
    path, measured = export(model, tmp_path, type=kind)
    assert measured["bytes"] < ratio * 1.05 * model.weight_bytes()
    assert measured["kl_mean"] < (1e-3 if kind == "auto" else 0.1)
    if kind != "auto":
        return
    prompt = "def read(self, path):\n    "
    tokenizer: Any = model.load_tokenizer()
    loaded: Any = model.load().float()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = loaded.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    done = subprocess.run([sys.executable, "-c", CONTINUE, path, prompt], capture_output=True, timeout=120, check=True)
    assert done.stdout.decode().partition("ANSWER:")[2] == tokenizer.decode(made)


def test_nothing_is_lost_between_the_weights_and_the_file(build: Builder, tmp_path: Path) -> None:
    """Every number of a dense model is in the file once."""
    model = build("qwen3")
    path, _ = export(model, tmp_path)
    held, stored = tensors_of(path), load_file(model.path / "model.safetensors")
    assert sum(array.size for _, array in held.values()) == sum(tensor.numel() for tensor in stored.values())
    np.testing.assert_array_equal(
        held["blk.2.attn_q.weight"][1], stored["model.layers.2.self_attn.q_proj.weight"].numpy()
    )
