"""What the walk cannot take apart is refused before any step computes; what it can is asked about once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator import fit
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import PreflightError
from orchestrator.fit import check_fit, examine, remember_fit
from orchestrator.home import Settings
from orchestrator.plan import Plan, make_plan
from orchestrator.plugins import discover
from orchestrator.preflight import foresee
from orchestrator.run import run_locally
from orchestrator.skeleton import Skeleton
from tests.test_run import Watcher
from tests.tiny import edit_config, make_model

SPEC = """\
version: 1
name: fitting
model: {id: model}
steps:
  - calibrate: text
    with: {source: text.txt, sequences: 8, length_tokens: 32}
  - prune: wanda
"""
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    (tmp_path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    return tmp_path


def plan_of(folder: Path) -> Plan:
    return make_plan(folder / "spec.yaml", discover(), folder / "home")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})


def without_up(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(UP))


def misshapen(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(32)}))


def untied(folder: Path) -> None:
    edit_config(folder / "model", tie_word_embeddings=True)


def of_unknown_kind(folder: Path) -> None:
    edit_config(folder / "model", model_type="llamma", architectures=None)


FAULTS = [
    (without_up, rf"{UP} is missing .*copy the model again"),
    (misshapen, r"has shape \(32,\), but .* \(64,\).*copy the model again"),
    (
        untied,
        r"ties lm_head\.weight to model\.embed_tokens\.weight, but .* different.*set tie_word_embeddings to false",
    ),
    (of_unknown_kind, r"'llamma'.*use a text model"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
@pytest.mark.parametrize("apart", [False, True])
def test_what_cannot_be_taken_apart_is_refused_at_its_step(
    folder: Path, damage: Callable[[Path], None], message: str, apart: bool
) -> None:
    damage(folder)
    plan = plan_of(folder)
    with pytest.raises(PreflightError, match=message) as caught:
        check_fit(plan, [None, None], folder / "home", apart=apart)
    (problem,) = caught.value.problems
    assert problem.where == f"{folder / 'spec.yaml'}:7: steps[1].prune"


def test_a_run_refuses_before_its_first_step(folder: Path, tracking_uri: str) -> None:
    without_up(folder)
    watcher = Watcher()
    with pytest.raises(PreflightError, match="is missing"):
        run_locally(folder / "spec.yaml", discover(), Settings(folder / "home", tracking_uri), watcher)
    assert not (folder / "home").exists(), "nothing is written"


def test_only_matrices_that_are_tied_rightly_pass(tmp_path: Path) -> None:
    """Old checkpoints store the head beside the table that it is the same as."""
    model = make_model(tmp_path / "model", "gpt2")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with closing(Skeleton(Checkpoint(model))) as skeleton:
        assert skeleton.stored_ties() == [("lm_head.weight", "transformer.wte.weight")]
    examine(Checkpoint(model))
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match="but the two are stored with different numbers"):
        examine(Checkpoint(model))


def test_a_model_that_fits_is_asked_about_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home"
    home.mkdir()
    plan = plan_of(folder)
    key = check_fit(plan, [None, None], home)
    assert key is not None
    remember_fit(home, key)
    monkeypatch.setattr(fit, "examine", lambda checkpoint: pytest.fail("asked again"))
    assert check_fit(plan, [None, None], home) is None
    edit_config(folder / "model", rms_norm_eps=1e-5)
    with pytest.raises(pytest.fail.Exception):
        check_fit(plan_of(folder), [None, None], home)


def test_plan_asks_without_importing_torch(folder: Path) -> None:
    (folder / "home").mkdir()
    command = [sys.executable, "-m", "orchestrator", "plan", str(folder / "spec.yaml")]
    environment = {**os.environ, "ORCHESTRATOR_HOME": str(folder / "home")}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert len(json.loads((folder / "home" / "machine.json").read_text())["fitting"]) == 1
    without_up(folder)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 3 and f"{UP} is missing" in done.stderr and "Traceback" not in done.stderr


def test_windows_beyond_the_positions_are_refused(folder: Path) -> None:
    edit_config(folder / "model", max_position_embeddings=31)
    with pytest.raises(PreflightError, match=r"spec.yaml:5.*windows of 32 .* the 31 positions.*length_tokens to .* 31"):
        foresee(plan_of(folder), folder / "home", [None, None])


def test_a_home_that_holds_no_files_is_no_full_disk(folder: Path) -> None:
    plan = plan_of(folder)
    (folder / "file").touch()
    for home in (Path("/proc/home"), folder / "file" / "home"):
        with pytest.raises(PreflightError, match=rf"home folder {home} cannot be made: .*set ORCHESTRATOR_HOME"):
            foresee(plan, home, [None, None])
