"""A sparse result says plainly that nobody profits from its zeros, unless its layout leaves them out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.artifact import ArtifactStore
from orchestrator.checkpoint import Checkpoint
from orchestrator.home import Settings
from orchestrator.plugins import discover
from orchestrator.run import run_locally
from orchestrator.zeros import zeros_note
from tests.test_run import Watcher
from tests.tiny import edit_config, make_model

SPEC = """\
version: 1
name: sparse
model: {id: model}
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 4, length_tokens: 16}
  - prune: wanda
    with: {pattern: "2:4"}
  - quantize: rtn
    with: {group_size: 32}
  - register: release
"""
LAYERS = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)  # weights of the tiny model's layers in blocks


def run(folder: Path, tracking_uri: str, text: str = SPEC) -> tuple[dict[str, Any], Settings]:
    make_model(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    (folder / "spec.yaml").write_text(text, encoding="utf-8")
    settings = Settings(folder / "home", tracking_uri)
    return run_locally(folder / "spec.yaml", discover(), settings, Watcher()).document(), settings


def command(settings: Settings, *arguments: str) -> str:
    variables = {"ORCHESTRATOR_HOME": str(settings.home), "MLFLOW_TRACKING_URI": settings.tracking_uri}
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sparse_result_says_that_its_zeros_save_nothing(tmp_path: Path, tracking_uri: str) -> None:
    document, settings = run(tmp_path, tracking_uri)
    calibrated, pruned, quantized, released = document["steps"]
    assert "zeros" not in calibrated and "zeros" not in released
    dense, packed = Checkpoint(Path(pruned["artifact"]["path"])), Checkpoint(Path(quantized["artifact"]["path"]))
    # 2 bytes each; packed, half a byte. Rounding to the grid has made some more.
    for step, model, item in ((pruned, dense, 2.0), (quantized, packed, 0.5)):
        share = (
            ArtifactStore(settings.home).find(step["artifact"]["digest"]).manifest["invariants"]["zeros"]["fraction"]
        )
        assert share == pytest.approx(0.5, abs=0.01)
        taken = share * LAYERS * item / 1024
        said = f"{taken:,.2f} KiB of the {model.weight_bytes() / 1024:,.2f} KiB on disk are zeros"
        assert step["zeros"].startswith(f"{share:.1%} of the weights in decoder blocks are zero (2:4), stored and mult")
        assert said in step["zeros"]
        assert step["zeros"].endswith("They save neither bytes nor time.")
    manifest = json.loads((Path(document["release"]["uri"].removeprefix("file://")) / "release.json").read_text())
    assert manifest["zeros"] == quantized["zeros"]
    shown = command(settings, "show", quantized["artifact"]["digest"])
    assert f"zeros        {quantized['zeros']}" in shown
    again = command(settings, "run", str(tmp_path / "spec.yaml"), "--local")
    assert f"zeros     {quantized['zeros']}" in again


def test_a_dense_result_says_nothing_of_zeros(tmp_path: Path, tracking_uri: str) -> None:
    document, settings = run(tmp_path, tracking_uri, SPEC.replace('  - prune: wanda\n    with: {pattern: "2:4"}\n', ""))
    assert not any("zeros" in step for step in document["steps"])
    artifact = ArtifactStore(settings.home).find(document["steps"][1]["artifact"]["digest"])
    assert "zeros  " not in command(settings, "show", artifact.digest)


@pytest.mark.parametrize("entry", [{"format": "marlin-24"}, {"sparsity_config": {"format": "sparse-24-bitmask"}}])
def test_a_layout_that_leaves_zeros_out_is_not_called_useless(entry: dict[str, Any], tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path, tokenizer=False))
    facts = {"zeros": {"fraction": 0.5, "pattern": "2:4", "layers": 21}}
    edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors", **entry})
    note = str(zeros_note(model, facts))
    assert "leaves them out" in note and "neither bytes nor time" not in note
    assert zeros_note(model, {}) is None
