"""Every architecture goes through the walk: its layers, the statistics they get, and what stock Transformers then makes
of the result. Experts and transposed layers are computed here by other means than the walk's.

Shape legend: N = sequences, T = tokens, I = in features, K = experts per token, E = experts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orchestrator.architectures import KNOWN, UnfusedExperts
from orchestrator.calibration import CalibrationSet
from orchestrator.capture import BATCH_TOKENS
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError, StepError
from orchestrator.export import ModelWriter, save_model
from orchestrator.invariants import check_artifact
from orchestrator.layer_method import LayerMethod
from orchestrator.layers import fused_groups, split_fused_groups, unquantizable
from orchestrator.packing import unpack
from orchestrator.plan import make_plan
from orchestrator.plugins import discover
from orchestrator.proof import prove
from orchestrator.reader import TensorReader
from orchestrator.skeleton import Skeleton
from orchestrator.walk import WalkReport, walk
from tests.layer_methods import Identity, KeepLarge, Round, half_of_every_four
from tests.tiny import ALWAYS_TIED, ARCHITECTURES, OTHER_ARCHITECTURES, edit_config, make_model, make_tokens

ALL = (*ARCHITECTURES, *OTHER_ARCHITECTURES)
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
ATTENTION = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
ATTENTION |= {"self_attn.o_proj": (64, 64)}
WIDE_HEADS = {"self_attn.q_proj": (128, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64)}
WIDE_HEADS |= {"self_attn.o_proj": (64, 128)}
DENSE = {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
EXPERTS = {f"mlp.experts.{e}.{leaf}_proj": (64, 64) for e in range(4) for leaf in ("gate", "up", "down")}
# Layers of the last block by their names in it, with (out features, in features).
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "llama": ATTENTION | DENSE,
    "qwen2": ATTENTION | DENSE,
    "qwen3": WIDE_HEADS | DENSE,
    "mistral": ATTENTION | DENSE,
    "gemma2": WIDE_HEADS | DENSE,
    "gemma3_text": WIDE_HEADS | DENSE,
    "phi3": {
        "self_attn.qkv_proj": (128, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_up_proj": (256, 64),
        "mlp.down_proj": (64, 128),
    },
    "gpt2": {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (128, 64), "mlp.c_proj": (64, 128)},
    "opt": {f"self_attn.{n}_proj": (64, 64) for n in ("q", "k", "v", "out")} | {"fc1": (128, 64), "fc2": (64, 128)},
    "gpt_neox": {
        "attention.query_key_value": (192, 64),
        "attention.dense": (64, 64),
        "mlp.dense_h_to_4h": (128, 64),
        "mlp.dense_4h_to_h": (64, 128),
    },
    "mixtral": ATTENTION
    | {
        f"block_sparse_moe.experts.{e}.{leaf}": shape
        for e in range(4)
        for leaf, shape in (("w1", (128, 64)), ("w2", (64, 128)), ("w3", (128, 64)))
    },
    "qwen2_moe": ATTENTION | EXPERTS | {name.replace("mlp", "mlp.shared_expert"): s for name, s in DENSE.items()},
    "qwen3_moe": ATTENTION | EXPERTS,
}
Builder = Callable[..., Checkpoint]


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A function that gives a tiny checkpoint, made once for all tests of this file; none of them changes it."""
    made: dict[tuple[str, bool], Path] = {}

    def get(architecture: str, *, tied: bool = False) -> Checkpoint:
        key = (architecture, tied)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture) / "model"
            made[key] = make_model(folder, architecture, tied=tied, tokenizer=False)
        return Checkpoint(made[key])

    return get


def run_walk(
    checkpoint: Checkpoint,
    method: LayerMethod,
    folder: Path,
    tokens_NT: torch.Tensor | None = None,
    skip: Sequence[str] = (),
) -> tuple[WalkReport, Checkpoint]:
    writer = ModelWriter(checkpoint, folder, scheme=method.scheme(), skip=skip)
    report = walk(checkpoint, method, None if tokens_NT is None else CalibrationSet(tokens_NT, {}), writer, skip=skip)
    writer.finish()
    return report, Checkpoint(folder)


def stock(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model as any user of Transformers loads it; nothing may be missing or left over."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return stock(folder)(make_tokens(2)).logits  # type: ignore[no-any-return]


def with_tensors(checkpoint: Checkpoint, folder: Path, change: Callable[[str, torch.Tensor], Any]) -> Path:
    """Copy a checkpoint; `change` returns each tensor's successor, or its new name and the successor."""
    shutil.copytree(checkpoint.path, folder)
    changed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        result = change(name, tensor)
        new_name, new_tensor = result if isinstance(result, tuple) else (name, result)
        changed[new_name] = new_tensor.contiguous()
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_tests_cover_what_is_taken_for_known() -> None:
    assert set(ALL) == KNOWN == set(LAYERS)


@pytest.mark.parametrize("architecture", ALL)
def test_the_layers_on_disk_are_those_of_the_walk(build: Builder, architecture: str) -> None:
    checkpoint = build(architecture)
    last = Skeleton(checkpoint).blocks[-1]
    found = {s.name: (s.out_features, s.in_features) for s in checkpoint.block_layers() if last.name in s.name}
    assert found == {f"{last.name}.{name}": shape for name, shape in LAYERS[architecture].items()}
    assert found == {name: (layer.out_features, layer.in_features) for name, layer in last.linears.items()}
    assert last.transposed == (set(found) if architecture == "gpt2" else set())
    assert last.experts == {name for name in found if ".experts." in name}
    assert sorted(name for group in last.same_input for name in group) == sorted(last.experts)


@pytest.mark.parametrize("architecture", ALL)
def test_blocks_run_one_by_one_put_out_what_they_do_in_the_stock_model(build: Builder, architecture: str) -> None:
    checkpoint = build(architecture)
    assert prove(checkpoint) == 3
    kinds = {"qwen2": 2, "gemma2": 2, "gemma3_text": 2, "qwen2_moe": 2, "qwen3_moe": 2}
    assert prove(checkpoint, whole_bytes=0) == kinds.get(architecture, 1)


def expected_inputs(checkpoint: Checkpoint, tokens_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs [tokens, I] in float64 of every layer in a block, from hooks in the loaded model.

    Experts are no modules there: what each of them sees is computed from the stored matrices and from the input of
    the mixture.
    """
    from transformers.pytorch_utils import Conv1D

    model = stock(checkpoint.path, torch.float64)
    if model.config.model_type in MIXTURES:
        model.set_experts_implementation("eager")  # torch has no grouped_mm for float64
    stored = load_file(checkpoint.path / "model.safetensors")
    inputs: dict[str, torch.Tensor] = {}

    def keep_experts(name: str, x_TI: torch.Tensor) -> None:
        prefix = name.replace(".mlp", ".block_sparse_moe") if model.config.model_type == "mixtral" else name
        gate, up = ("w1", "w3") if model.config.model_type == "mixtral" else ("gate_proj", "up_proj")
        down = "w2" if gate == "w1" else "down_proj"
        scores_TE = x_TI @ stored[f"{prefix}.gate.weight"].double().T
        chosen_TK = scores_TE.argsort(dim=1, descending=True)[:, :2]
        for e in range(4):
            seen_TI = x_TI[(chosen_TK == e).any(dim=1)]
            matrix = {leaf: stored[f"{prefix}.experts.{e}.{leaf}.weight"].double() for leaf in (gate, up)}
            inputs[f"{prefix}.experts.{e}.{gate}"] = inputs[f"{prefix}.experts.{e}.{up}"] = seen_TI
            inner = nn.functional.silu(seen_TI @ matrix[gate].T) * (seen_TI @ matrix[up].T)
            inputs[f"{prefix}.experts.{e}.{down}"] = inner

    for name, module in model.named_modules():
        if not re.search(r"\.(layers|h)\.\d+\.", name) or name.endswith("shared_expert_gate"):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(lambda m, x, n=name: inputs.update({n: x[0].flatten(0, -2)}))
        elif hasattr(module, "experts"):
            module.register_forward_pre_hook(lambda m, x, n=name: keep_experts(n, x[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens_NT)
    return inputs


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)  # the others: tests/test_walk.py
def test_statistics_are_those_of_the_whole_model(
    tmp_path: Path, build: Builder, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 48)  # two sequences at a time, and one at the end
    checkpoint = build(architecture)
    tokens_NT = make_tokens(5, 24)
    Identity.seen.clear()
    report, result = run_walk(checkpoint, Identity(), tmp_path / "out", tokens_NT)
    expected = expected_inputs(checkpoint, tokens_NT)
    assert len(expected) > 10 and set(report.layers) == set(expected)
    names = list(report.layers)
    if architecture not in MIXTURES:  # in the order of their calls, which Phi-3 does not define its layers in
        names.sort(key=list(expected).index)
    for name, statistic in zip(names, Identity.seen, strict=True):
        x_TI = expected[name]
        assert statistic is not None and statistic.num_tokens == x_TI.shape[0]
        assert (x_TI.shape[0] == 5 * 24) == (".experts." not in name)
        hessian_II = x_TI.T @ x_TI
        assert (statistic.require_hessian() - hessian_II).abs().max() < 1e-5 * hessian_II.abs().max(), name
        assert torch.allclose(statistic.sum_abs_I.double(), x_TI.abs().sum(0), rtol=1e-4)
    if architecture in MIXTURES:
        assert sum(len(expected[n]) for n in expected if re.search(r"layers\.2.*experts.*(w2|down)", n)) == 2 * 5 * 24
    before, after = (load_file(c.path / "model.safetensors") for c in (checkpoint, result))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(checkpoint.path), logits(result.path))


@pytest.mark.parametrize("architecture", ALL)
def test_a_pruned_and_tied_model_is_loaded_by_stock_transformers(
    tmp_path: Path, build: Builder, architecture: str
) -> None:
    checkpoint = build(architecture, tied=True)
    _, result = run_walk(checkpoint, KeepLarge(), tmp_path / "out")
    layers = {f"{s.name}.weight" for s in checkpoint.block_layers()}
    turned = architecture == "gpt2"

    def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in layers:
            return tensor
        return half_of_every_four(tensor.T.contiguous()).T if turned else half_of_every_four(tensor)

    expected = with_tensors(checkpoint, tmp_path / "expected", half)
    assert not torch.equal(logits(checkpoint.path), logits(expected))
    assert torch.equal(logits(result.path), logits(expected))
    facts = check_artifact(checkpoint, result, {}, claims={"zeros": {"pattern": "2:4", "skip": []}})
    assert facts["zeros"]["pattern"] == "2:4" and facts["zeros"]["layers"] == len(layers)
    assert not {"lm_head.weight", "embed_out.weight"} & result.tensors.keys()
    model = stock(result.path)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_zeros_along_the_wrong_side_of_a_transposed_layer_are_found(tmp_path: Path, build: Builder) -> None:
    checkpoint = build("gpt2")
    wrong = with_tensors(checkpoint, tmp_path / "a", lambda n, t: half_of_every_four(t) if t.ndim == 2 else t)
    with pytest.raises(StepError, match=r"does not keep to the pattern 2:4"):
        check_artifact(checkpoint, Checkpoint(wrong), {}, claims={"zeros": {"pattern": "2:4", "skip": []}})


@pytest.mark.parametrize("architecture", [name for name in OTHER_ARCHITECTURES if name != "gpt2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_model_computes_in_stock_transformers_what_its_integers_stand_for(
    tmp_path: Path, build: Builder, architecture: str, symmetric: bool
) -> None:
    checkpoint = build(architecture)
    method = Round(symmetric=symmetric)
    names = [layer.name for layer in checkpoint.block_layers()]
    _, result = run_walk(checkpoint, method, tmp_path / "out")
    if architecture in MIXTURES and not symmetric:
        with pytest.raises(RuntimeError, match="conversion"):  # so `plan` refuses it; when this loads, it need not
            stock(result.path)
        assert [place for place, *_ in unquantizable(checkpoint.config, names, [], method.scheme())] == [("with",)]
        return
    assert not list(unquantizable(checkpoint.config, names, [], method.scheme()))

    def dequantized(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        return unpack(read, layer, method.scheme()).dequantize(torch.bfloat16) if layer in names else tensor

    with TensorReader(result) as read:
        expected = with_tensors(checkpoint, tmp_path / "expected", dequantized)
    assert torch.equal(logits(result.path), logits(expected))
    assert not torch.equal(logits(result.path), logits(checkpoint.path))
    with torch.no_grad():
        assert torch.equal(result.load()(make_tokens(2)).logits, logits(expected))
    ignored = set(result.config["quantization_config"]["ignore"])
    assert ignored >= set(Skeleton(checkpoint).linear_names()) - set(names)
    assert not ignored & set(names)


@pytest.mark.parametrize("skip", [["experts.*"], ["layers.1.*"]])
def test_a_quantized_mixture_with_plain_experts_is_not_loaded_by_transformers(
    tmp_path: Path, build: Builder, skip: list[str]
) -> None:
    """Why `plan` refuses it; when a later Transformers loads it, this test says so."""
    checkpoint = build("qwen3_moe")
    _, result = run_walk(checkpoint, Round(), tmp_path / "out", skip=skip)
    with pytest.raises(RuntimeError, match="conversion"):
        stock(result.path)
    names = [layer.name for layer in checkpoint.block_layers()]
    assert [place for place, *_ in unquantizable(checkpoint.config, names, skip, Round().scheme())] == [("skip",)]
    assert not list(unquantizable(checkpoint.config, names, ["layers.0.*", "q_proj"], Round().scheme()))


SPEC = """\
version: 1
name: plan
model: {{id: {model}}}
steps:
  - calibrate: text
    with: {{source: text.txt, sequences: 2, length_tokens: 16}}
  - {step}
"""


@pytest.mark.parametrize(
    ("architecture", "step", "message"),
    [
        ("gpt2", "quantize: rtn", r"'gpt2' model keeps its layers as Conv1D.*prune it"),
        ("mixtral", "{quantize: rtn, with: {symmetric: false}}", r"experts.*zero points.*symmetric: true"),
        (
            "mixtral",
            "{quantize: mixed, with: {bits_per_weight: 5, group_size: 32}}",
            r"experts.*first of several.*one scheme",
        ),
        ("mixtral", "{quantize: fp8}", r"merges the experts.*inputs.*weights only"),
        ("mixtral", "{quantize: rtn, skip: ['layers.0.*']}", r"some experts unquantized.*quantize all"),
        ("mixtral", "{quantize: rtn, skip: ['experts.0.w1']}", r"leaves out 0\.w1 of .*experts, but.*all experts"),
        ("gpt2", "{prune: wanda, with: {pattern: '2:4'}}", None),
        ("mixtral", "{quantize: rtn, with: {group_size: 32}, skip: [q_proj, k_proj, v_proj]}", None),
    ],
)
def test_plan_refuses_what_nobody_could_load(tmp_path: Path, architecture: str, step: str, message: str | None) -> None:
    from orchestrator.errors import OrchestratorError

    model = make_model(tmp_path / "model", architecture)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200, encoding="utf-8")
    (tmp_path / "spec.yaml").write_text(SPEC.format(model=model, step=step), encoding="utf-8")
    if message is None:
        assert len(make_plan(tmp_path / "spec.yaml", discover(), tmp_path / "home").steps) == 2
    else:
        with pytest.raises(OrchestratorError, match=message):
            make_plan(tmp_path / "spec.yaml", discover(), tmp_path / "home")


def test_experts_of_a_block_are_one_layer_to_an_engine(build: Builder) -> None:
    names = [layer.name for layer in build("mixtral").block_layers()]
    groups = [group for group in fused_groups(names) if "experts" in group[0]]
    assert [len(group) for group in groups] == [12, 12, 12]
    (problem,) = split_fused_groups(names, ["layers.1.*.experts.[12].*"])
    assert "1.w1, 1.w2, 1.w3, 2.w1 and 2 more of model.layers.1.block_sparse_moe.experts" in problem
    assert split_fused_groups(names, ["layers.1.*.experts.*", "o_proj"]) == []


def test_experts_that_see_no_token_are_reported_and_compressed_as_if_inputs_were_alike(
    tmp_path: Path, build: Builder
) -> None:
    Identity.seen.clear()
    report, _ = run_walk(build("mixtral"), Identity(), tmp_path / "out", make_tokens(1, 1))
    seen = dict(zip(report.layers, Identity.seen, strict=True))
    for block in range(3):
        names = [f"model.layers.{block}.block_sparse_moe.experts.{e}.w1" for e in range(4)]
        unseen = [name for name in names if report.layers[name].get("unseen_experts")]
        assert len(unseen) == 2
        for name in names:
            statistic = seen[name]
            assert statistic is not None and statistic.num_tokens == 1
            alike = torch.equal(statistic.require_hessian(), torch.eye(64))
            assert alike == (name in unseen)
            assert (report.layers[name].get("tokens") == 0) == (name in unseen)
            assert ("starved_experts" in report.layers[name]) == (name not in unseen)
    # Three blocks, two experts of each, three layers of each expert.
    assert report.metrics["unseen_experts"] == report.metrics["starved_experts"] == 3 * 2 * 3
    plenty, _ = run_walk(build("mixtral"), Identity(), tmp_path / "plenty", make_tokens(8, 100))
    assert plenty.metrics["unseen_experts"] == plenty.metrics["starved_experts"] == 0


@pytest.mark.parametrize(("architecture", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model.")])
def test_checkpoints_without_the_name_of_the_base_model_are_walked(
    tmp_path: Path, build: Builder, architecture: str, prefix: str
) -> None:
    checkpoint = build(architecture)
    short = Checkpoint(
        with_tensors(checkpoint, tmp_path / "short", lambda name, tensor: (name.removeprefix(prefix), tensor))
    )
    assert prove(short) == 3
    _, expected = run_walk(checkpoint, KeepLarge(), tmp_path / "long-out")
    Identity.seen.clear()
    run_walk(short, Identity(), tmp_path / "same", make_tokens(2))
    _, result = run_walk(short, KeepLarge(), tmp_path / "short-out")
    assert result.tensors.keys() == short.tensors.keys() != checkpoint.tensors.keys()
    assert torch.equal(logits(result.path), logits(expected.path))
    save_model(short.load(), short, tmp_path / "saved")
    assert Checkpoint(tmp_path / "saved").tensors.keys() == short.tensors.keys()


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
def test_a_model_that_a_method_changed_is_saved_under_the_stored_names(
    tmp_path: Path, build: Builder, architecture: str
) -> None:
    checkpoint = build(architecture)
    save_model(checkpoint.load(), checkpoint, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_distillation_sees_the_zeros_of_every_layer(tmp_path: Path, build: Builder, architecture: str) -> None:
    from orchestrator_distillation.zeros import ZeroMask

    checkpoint = build(architecture)
    _, result = run_walk(checkpoint, KeepLarge(), tmp_path / "out")
    weights = sum(layer.out_features * layer.in_features for layer in checkpoint.block_layers())
    model = result.load()
    mask = ZeroMask(model)
    assert mask.count == weights // 2
    assert not mask.violations()
    for parameter in model.parameters():
        parameter.data += 1
    assert mask.violations()
    mask.clear_weights()
    save_model(model, result, tmp_path / "saved")
    kept = check_artifact(result, Checkpoint(tmp_path / "saved"), {"zeros": {"pattern": "2:4"}})
    assert kept["zeros"]["fraction"] == 0.5


def test_the_masks_that_old_checkpoints_store_travel_along(tmp_path: Path, build: Builder) -> None:
    folder = shutil.copytree(build("gpt2").path, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(3)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, result = run_walk(Checkpoint(folder), KeepLarge(), tmp_path / "out")
    assert result.tensors.keys() == tensors.keys()
    stock(result.path)


def other_model(folder: Path, kind: str, **entries: Any) -> Checkpoint:
    """A checkpoint of an architecture that is not among the known ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0}
    config = AutoConfig.for_model(kind, **{**common, **heads, "eos_token_id": 1, **entries})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model.save_pretrained(folder)
    return Checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("stablelm", {}),
        ("starcoder2", {}),
        ("openai-gpt", {"n_embd": 64, "n_layer": 2, "n_head": 4, "intermediate_size": 256}),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_other_architectures_are_walked_after_their_proof(tmp_path: Path, kind: str, entries: dict[str, Any]) -> None:
    checkpoint = other_model(tmp_path / "model", kind, **entries)
    assert not Skeleton(checkpoint).is_known
    Identity.seen.clear()
    report, result = run_walk(checkpoint, Identity(), tmp_path / "out", make_tokens(2))
    assert set(report.layers) == {layer.name for layer in checkpoint.block_layers()} and len(report.layers) >= 8
    assert torch.equal(logits(checkpoint.path), logits(result.path))


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, r"'bloom'.*its blocks do not run one by one.*use a model like"),
        ("mamba", {}, r"'mamba'.*A_log belongs to a MambaMixer, not to a linear layer"),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, r"'gpt_oss'.*experts.*not stored one by one"),
    ],
)
def test_architectures_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, kind: str, entries: dict[str, Any], message: str
) -> None:
    checkpoint = other_model(tmp_path / "model", kind, **entries)
    with pytest.raises(PreflightError, match=message):
        run_walk(checkpoint, Identity(), tmp_path / "out", make_tokens(2))


def test_the_proof_finds_a_wrong_mask_and_wrong_experts(build: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_masks(self: Skeleton, *inputs: Any) -> Any:
        hidden, arguments = capture(self, *inputs)
        return hidden, [{**given, "attention_mask": None} for given in arguments]

    def unweighted(self: UnfusedExperts, hidden_TI: torch.Tensor, chosen_TK: torch.Tensor, weights: Any) -> Any:
        return forward(self, hidden_TI, chosen_TK, torch.full_like(weights, 0.5))

    capture, forward = Skeleton.capture, UnfusedExperts.forward
    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "capture", without_masks)
        with pytest.raises(PreflightError, match=r"'gemma2'.*model\.layers\.0 puts out other numbers"):
            prove(build("gemma2"))
    with monkeypatch.context() as patch:
        patch.setattr(UnfusedExperts, "forward", unweighted)
        with pytest.raises(PreflightError, match=r"'qwen3_moe'.*model\.layers\.1 puts out other numbers"):
            prove(build("qwen3_moe"))


def test_a_multimodal_model_is_refused_with_a_hint(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gemma3_text")
    edit_config(model, model_type="gemma3", vision_config={}, text_config={})
    with pytest.raises(PreflightError, match=r"'gemma3' model has parts for images.*gemma3_text"):
        Skeleton(Checkpoint(model))
    (tmp_path / "text.txt").write_text("the quick brown fox " * 200, encoding="utf-8")
    step = "{prune: wanda, with: {sparsity: 0.5}}"
    (tmp_path / "spec.yaml").write_text(SPEC.format(model=model, step=step), encoding="utf-8")
    with pytest.raises(PreflightError, match=r"'gemma3' model has parts for images.*gemma3_text"):
        make_plan(tmp_path / "spec.yaml", discover(), tmp_path / "home")


def test_experts_that_are_stored_fused_are_refused(tmp_path: Path, build: Builder) -> None:
    folder = shutil.copytree(build("qwen3_moe").path, tmp_path / "fused")
    model = stock(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if "experts" in name}
    plain = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." not in n}
    save_file({**plain, **state}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match=r"experts of model\.layers\.1\.mlp\.experts are not stored one by one"):
        Skeleton(Checkpoint(folder))


def test_only_tied_models_leave_the_head_out(build: Builder) -> None:
    """That the tests with ``tied=True`` test something."""
    for architecture in ALL:
        heads = {"lm_head.weight", "embed_out.weight"} & build(architecture).tensors.keys()
        assert len(heads) == (0 if architecture in ALWAYS_TIED else 1)
