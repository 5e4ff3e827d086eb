"""What an artifact claims to have kept is checked on the stored bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError, StepError
from orchestrator.export import ModelWriter
from orchestrator.invariants import check_artifact
from orchestrator.layer_method import LayerMethod
from orchestrator.walk import walk
from tests.layer_methods import KeepLarge, Round
from tests.tiny import edit_config, make_model

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dense(tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_model(tmp_path / "dense", layers=2, tokenizer=False))


@pytest.fixture
def pruned(dense: Checkpoint, tmp_path: Path) -> Checkpoint:
    return _compress(dense, tmp_path / "pruned", KeepLarge())


def _compress(checkpoint: Checkpoint, folder: Path, method: LayerMethod, skip: tuple[str, ...] = ()) -> Checkpoint:
    writer = ModelWriter(checkpoint, folder, scheme=method.scheme(), skip=skip)
    walk(checkpoint, method, None, writer, skip=skip)
    writer.finish()
    return Checkpoint(folder)


def _damage(checkpoint: Checkpoint, name: str, change: Callable[[torch.Tensor], Any]) -> Checkpoint:
    """A copy of the checkpoint with one tensor changed in place."""
    folder = checkpoint.path.with_name(checkpoint.path.name + "-damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint.path, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


def test_a_dense_model_has_no_invariants(dense: Checkpoint) -> None:
    assert check_artifact(dense, dense, {}) == {}


def test_pruning_is_found_with_its_pattern(dense: Checkpoint, pruned: Checkpoint) -> None:
    expected = {"zeros": {"fraction": 0.5, "pattern": "2:4", "layers": 14}}
    assert check_artifact(dense, pruned, {}) == expected
    assert check_artifact(dense, pruned, {}, claims={"zeros": {"pattern": "2:4"}}) == expected


def test_unstructured_and_row_zeros_are_told_apart(dense: Checkpoint) -> None:
    def zero_row_wise(weight_OI: torch.Tensor) -> None:
        weight_OI[:, :7] = 0

    def zero_anywhere(weight_OI: torch.Tensor) -> None:
        weight_OI[3, :20] = 0
        weight_OI[40, 2:60] = 0
        weight_OI[50, 2:40] = 0

    weights = {s.name: s.in_features * s.out_features for s in dense.block_layers()}
    found = check_artifact(dense, _damage(dense, f"{UP}.weight", zero_row_wise), {})["zeros"]
    assert found == {"fraction": 7 * 128 / sum(weights.values()), "pattern": "row", "layers": 1}
    found = check_artifact(dense, _damage(dense, f"{UP}.weight", zero_anywhere), {})["zeros"]
    assert found == {"fraction": 116 / sum(weights.values()), "pattern": None, "layers": 1}


def test_zeros_survive_quantization_and_the_fact_is_passed_on(
    dense: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    kept = check_artifact(dense, pruned, {})
    for method in (Round(), Round(num_bits=8, symmetric=False, group_size=None)):
        quantized = _compress(pruned, tmp_path / f"q{method.num_bits}", method)
        facts = check_artifact(pruned, quantized, kept, claims={"grid": {"num_bits": method.num_bits}})
        assert facts["zeros"]["pattern"] == "2:4" and facts["zeros"]["layers"] == 14
        assert facts["zeros"]["fraction"] >= 0.5
        assert facts["grid"]["num_bits"] == method.num_bits and facts["grid"]["format"] == "pack-quantized"
        # The same artifact again, now as the one to be kept.
        assert check_artifact(quantized, quantized, facts) == facts


def test_zeros_of_a_grid_alone_are_no_mask(dense: Checkpoint, tmp_path: Path) -> None:
    quantized = _compress(dense, tmp_path / "q", Round(num_bits=2))
    assert check_artifact(dense, quantized, {}).keys() == {"grid"}


def test_a_lost_zero_is_named_with_its_layer(dense: Checkpoint, pruned: Checkpoint) -> None:
    kept = check_artifact(dense, pruned, {})
    position = tuple((load_file(pruned.path / "model.safetensors")[f"{UP}.weight"] == 0).nonzero()[7].tolist())
    lost = _damage(pruned, f"{UP}.weight", lambda weight_OI: weight_OI.__setitem__(position, 0.25))
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.up_proj lost 1 of its 4096 zeros"):
        check_artifact(pruned, lost, kept)
    assert check_artifact(pruned, lost, {})["zeros"]["pattern"] != "2:4"


def test_a_zero_lost_in_packed_integers_is_found(dense: Checkpoint, pruned: Checkpoint, tmp_path: Path) -> None:
    kept = check_artifact(dense, pruned, {})
    quantized = _compress(pruned, tmp_path / "q", Round())
    broken = _damage(quantized, f"{UP}.weight_packed", lambda words: words[5].zero_())  # eight times -8 in each word
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.up_proj lost 32 of its 4096 zeros"):
        check_artifact(pruned, broken, kept)


def test_a_claimed_pattern_must_hold_in_every_layer_but_the_skipped(dense: Checkpoint, tmp_path: Path) -> None:
    partly = _compress(dense, tmp_path / "partly", KeepLarge(), ("down_proj",))
    claim: dict[str, Any] = {"zeros": {"pattern": "2:4", "skip": ["down_proj"]}}
    assert check_artifact(dense, partly, {}, claims=claim)["zeros"]["layers"] == 12
    with pytest.raises(StepError, match=r"down_proj was to be pruned, but holds no zero"):
        check_artifact(dense, partly, {}, claims={"zeros": {"pattern": "2:4"}})
    shifted = _damage(partly, f"{UP}.weight", lambda w: w.copy_(w.roll(1, dims=1)))
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.up_proj does not keep to the pattern 2:4"):
        check_artifact(dense, shifted, {}, claims=claim)


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_numbers_that_are_not_finite_are_found_in_any_tensor(dense: Checkpoint, name: str) -> None:
    broken = _damage(dense, name, lambda tensor: tensor.view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(StepError, match=f"{name} holds numbers that are not finite"):
        check_artifact(dense, broken, {})


def test_scales_that_are_not_finite_are_found(dense: Checkpoint, tmp_path: Path) -> None:
    quantized = _compress(dense, tmp_path / "q", Round())
    broken = _damage(quantized, f"{UP}.weight_scale", lambda scale_OG: scale_OG[0].fill_(float("inf")))
    with pytest.raises(StepError, match="weight_scale holds numbers"):
        check_artifact(dense, broken, {})


def test_a_grid_that_is_lost_or_changed_is_refused(dense: Checkpoint, tmp_path: Path) -> None:
    four, eight = (_compress(dense, tmp_path / f"q{bits}", Round(num_bits=bits)) for bits in (4, 8))
    kept = check_artifact(dense, four, {})
    with pytest.raises(StepError, match="not quantized, though it should be"):
        check_artifact(four, dense, kept)
    with pytest.raises(StepError, match=r"down_proj is quantized as num_bits=8 .*, not as num_bits=4"):
        check_artifact(four, eight, kept)
    with pytest.raises(StepError, match="num_bits of the quantization is 8, not 4"):
        check_artifact(dense, eight, {}, claims={"grid": {"num_bits": 4}})
    with pytest.raises(StepError, match="not quantized, though it should be"):
        check_artifact(dense, dense, {}, claims={"grid": {}})


def test_changed_shapes_and_layers_cannot_pass_for_kept_zeros(
    dense: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    kept = check_artifact(dense, pruned, {})
    fewer = Checkpoint(make_model(tmp_path / "fewer", layers=1, tokenizer=False))
    with pytest.raises(StepError, match=r"model\.layers\.1\.mlp\.down_proj is in only one"):
        check_artifact(pruned, fewer, kept)
    narrow = Checkpoint(make_model(tmp_path / "narrow", layers=2, intermediate_size=64, tokenizer=False))
    with pytest.raises(StepError, match=r"down_proj changed its shape from \(64, 128\) to \(64, 64\)"):
        check_artifact(pruned, narrow, kept)


def test_foreign_quantization_is_refused(dense: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(dense.path, tmp_path / "foreign")
    edit_config(tmp_path / "foreign", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(PreflightError, match="'gptq'"):
        check_artifact(dense, Checkpoint(tmp_path / "foreign"), {})
