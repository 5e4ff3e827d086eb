"""Scales that are moved from inputs into weights: where they can go, and that nothing changes.

Shape legend: N = sequences, T = tokens, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from orchestrator.api import InputMoment, LayerResult, Needs, ScalingMethod, Stage
from orchestrator.calibration import CalibrationSet
from orchestrator.capture import Stream
from orchestrator.checkpoint import Checkpoint
from orchestrator.compression import WalkReport
from orchestrator.errors import StepError
from orchestrator.export import ModelWriter
from orchestrator.job import WalkSettings
from orchestrator.model import load_model
from orchestrator.parallel import Workers
from orchestrator.skeleton import Skeleton
from orchestrator.walk import walk
from tests.tiny import make_model, make_tokens

ATTENTION = {"self_attn.q_proj": ("input_layernorm", 0.0), "mlp.gate_proj": ("post_attention_layernorm", 0.0)}
DOWN = {"mlp.down_proj": ("mlp.up_proj", 0.0)}
# By architecture: the leader of a group, and where its scale can go. Queries share heads, but in OPT.
PLACES = {
    "llama": ATTENTION | DOWN,
    "qwen2": ATTENTION | DOWN,
    "qwen3": ATTENTION | DOWN,
    "gemma2": {
        "self_attn.q_proj": ("input_layernorm", 1.0),
        "mlp.gate_proj": ("pre_feedforward_layernorm", 1.0),
        "mlp.down_proj": ("mlp.up_proj", 0.0),
    },
    "phi3": {
        "self_attn.qkv_proj": ("input_layernorm", 0.0),
        "mlp.gate_up_proj": ("post_attention_layernorm", 0.0),
    },
    "opt": {
        "self_attn.q_proj": ("self_attn_layer_norm", 0.0),
        "self_attn.out_proj": ("self_attn.v_proj", 0.0),
        "fc1": ("final_layer_norm", 0.0),
        "fc2": ("fc1", 0.0),  # relu(s x) = s relu(x)
    },
    "gpt_neox": {
        "attention.query_key_value": ("input_layernorm", 0.0),
        "mlp.dense_h_to_4h": ("post_attention_layernorm", 0.0),
    },
    "mixtral": {"self_attn.q_proj": ("input_layernorm", 0.0)},
}


class ScaleOnly(ScalingMethod):
    """Moves scale, and leaves the weights as they then are."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "scale_only"
    paper: ClassVar[str] = "x / s times s."
    needs: ClassVar[Needs] = Needs.INPUT_NORM
    provides: ClassVar[frozenset[str]] = frozenset()  # type: ignore[assignment]

    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        return (statistic.sum_abs_I / statistic.num_tokens).clamp(min=1e-3) ** 0.7

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        assert statistic is not None
        return LayerResult(weight_OI.clone(), metrics={"mean_input": float(statistic.sum_abs_I.mean())})


def run_walk(model: Path, folder: Path, inputs: str = "propagated", skip: Sequence[str] = ()) -> WalkReport:
    checkpoint = Checkpoint(model)
    writer = ModelWriter(checkpoint, folder)
    settings = WalkSettings(inputs=inputs)  # type: ignore[arg-type]
    report = walk(checkpoint, ScaleOnly(), CalibrationSet(make_tokens(8), {}), writer, skip=skip, settings=settings)
    writer.finish()
    return report


@pytest.mark.parametrize("architecture", PLACES)
def test_the_place_of_a_scale_is_found_by_trying(tmp_path: Path, architecture: str) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture))
    skeleton, workers = Skeleton(checkpoint), Workers(1)
    stream = Stream(skeleton, make_tokens(2), tmp_path, workers, "cpu")
    with torch.no_grad():
        for block in skeleton.blocks:
            stream.go_to(block.index)
            skeleton.load(block.name)
            folds = stream.folds(block, stream.layout(block).leader_of)
            found = {
                leader.removeprefix(f"{block.name}."): (fold.owner.removeprefix(f"{block.name}."), fold.offset)
                for leader, fold in folds.items()
            }
            assert found == PLACES[architecture]
            skeleton.release(block.name)
    workers.close()


@pytest.mark.parametrize("inputs", ["propagated", "dense"])
@pytest.mark.parametrize("architecture", PLACES)
def test_moving_scale_changes_no_logit(tmp_path: Path, architecture: str, inputs: str) -> None:
    model = make_model(tmp_path / "model", architecture, dtype=torch.float32)
    report = run_walk(model, tmp_path / "scaled", inputs)
    groups = {name for name, values in report.layers.items() if values["scaled"]}
    assert groups and report.metrics["scaled"] == len(groups)
    tokens = make_tokens(2)
    with torch.no_grad():
        before = load_model(Checkpoint(model), torch.float32)(tokens).logits
        after = load_model(Checkpoint(tmp_path / "scaled"), torch.float32)(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert (tmp_path / "scaled" / "model.safetensors").read_bytes() != (model / "model.safetensors").read_bytes()


def test_inputs_are_measured_before_and_divided_for_the_method(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.float32)
    report = run_walk(model, tmp_path / "scaled")
    for name, values in report.layers.items():
        assert values["scaled"] == float("o_proj" not in name)
    scaled = [values["mean_input"] for values in report.layers.values() if values["scaled"]]
    assert all(value > 0 for value in scaled)


def test_what_is_skipped_is_neither_multiplied_nor_divided(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.float32)
    report = run_walk(model, tmp_path / "scaled", skip=["*.up_proj"])
    scaled = {name.rpartition(".")[2] for name, values in report.layers.items() if values["scaled"]}
    assert scaled == {"q_proj", "k_proj", "v_proj"}, "gate shares its input with up, and up would be divided for down"
    with pytest.raises(StepError, match=r"scale_only finds nothing in model\.layers\.0 that could be divided"):
        run_walk(model, tmp_path / "nothing", skip=["*.up_proj", "*.k_proj"])
