"""The walk on a CUDA device, against the walk on the CPU. Skipped where there is none.

Shape legend: I = in features.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.compression import WalkReport
from orchestrator.export import ModelWriter
from orchestrator.job import WalkSettings
from orchestrator.layer_method import InputMode, LayerMethod
from orchestrator.walk import walk
from orchestrator_pruning.wanda import Wanda
from orchestrator_quantization.gptq import GPTQ
from orchestrator_quantization.rtn import RTN
from tests.layer_methods import Identity
from tests.tiny import make_model, make_tokens

pytestmark = pytest.mark.gpu


def _run(checkpoint: Checkpoint, method: LayerMethod, folder: Path, device: str, inputs: InputMode) -> WalkReport:
    writer = ModelWriter(checkpoint, folder, scheme=method.scheme())
    calibration = CalibrationSet(make_tokens(8, 32), {})
    report = walk(checkpoint, method, calibration, writer, settings=WalkSettings(inputs=inputs, device=device))
    writer.finish()
    return report


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral", "gpt2"])
def test_statistics_on_the_device_are_those_of_the_cpu(tmp_path: Path, architecture: str) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", architecture))
    found = []
    for device in ("cpu", "cuda"):
        Identity.seen.clear()
        _run(checkpoint, Identity(), tmp_path / device, device, "dense")
        found.append([moment for moment in Identity.seen if moment is not None])
    for one, other in zip(*found, strict=True):
        assert other.sum_I.device.type == "cuda" and one.num_tokens == other.num_tokens
        hessian_II = one.require_hessian()
        # TF32 would be off by 1e-3.
        assert (other.require_hessian().cpu() - hessian_II).abs().max() < 1e-5 * hessian_II.abs().max()


@pytest.mark.parametrize("inputs", ["dense", "propagated"])
@pytest.mark.parametrize(
    "method", [RTN(group_size=32), GPTQ(group_size=32), GPTQ(group_size=32, act_order=True), Wanda()], ids=repr
)
def test_methods_lose_as_little_on_the_device_and_repeat_their_bytes(
    tmp_path: Path, method: LayerMethod, inputs: InputMode
) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    method = method.for_dtype("bfloat16")
    reports = {name: _run(checkpoint, method, tmp_path / name, "cuda", inputs) for name in ("cuda1", "cuda2")}
    reports["cpu"] = _run(checkpoint, method, tmp_path / "cpu", "cpu", inputs)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("cuda1", "cuda2"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for metric in ("relative_proxy_loss", "relative_weight_error", "zero_fraction"):
        if metric in reports["cpu"].metrics:
            assert reports["cuda1"].metrics[metric] == pytest.approx(reports["cpu"].metrics[metric], rel=0.02)
