"""Every ordered pair of first-party methods that change a model: it runs and keeps its invariants, or is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.artifact import ArtifactStore
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import SpecError
from orchestrator.home import Settings
from orchestrator.kv_scales import read_kv_scales
from orchestrator.method import Invariant, Stage
from orchestrator.plan import make_plan
from orchestrator.plugins import Methods, discover
from orchestrator.run import run_locally
from tests.test_run import Watcher
from tests.tiny import make_model

TRAINING = {"updates": 1, "batch_sequences": 2, "length_tokens": 32}
WRITES = {"prompt_tokens": 8, "answer_tokens": 4}
# How each is asked for; everything else is at its default.
PARAMETERS: dict[str, dict[str, Any]] = {
    "prune magnitude": {"sparsity": 0.5},
    "prune wanda": {"pattern": "2:4"},
    "prune sparsegpt": {"pattern": "2:4"},
    "prune depth": {"layers": 1},
    "prune llm_pruner": {"attention": False, "ratio": 0.25, "round_to": 32, "lora_rank": 0},
    "distill logits": TRAINING,
    "distill gkd": {**TRAINING, **WRITES},
    "distill distillm": {**TRAINING, **WRITES},
    "distill minillm": {**TRAINING, **WRITES},
    "distill qat": TRAINING,
    "distill qad": TRAINING,
    "quantize rtn": {"group_size": 32},
    "quantize hqq": {"group_size": 32},
    "quantize gptq": {"group_size": 32},
    "quantize sparse_gptq": {"group_size": 32, "pattern": "2:4"},
    "quantize awq": {"group_size": 32},
    "quantize smoothquant": {"activations": "static"},
    "quantize fp8": {},
    "quantize kv_scales": {},
    "quantize mixed": {"bits_per_weight": 5.5, "num_bits": [2, 4, 8], "group_size": 32},
}


@cache
def methods() -> Methods:
    return discover()


def changing() -> list[str]:
    """What can change a model, of those that come with this distribution."""
    found = []
    for method in methods().installed.values():
        cls = method.cls
        if cls.__module__.startswith("orchestrator_") and cls.stage in (Stage.PRUNE, Stage.DISTILL, Stage.QUANTIZE):
            found.append(f"{cls.stage} {cls.name}")
    return sorted(found)


PAIRS = [(first, second) for first in sorted(PARAMETERS) for second in sorted(PARAMETERS)]


def test_every_method_is_paired() -> None:
    assert changing() == sorted(PARAMETERS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composition")
    make_model(folder / "model", layers=3)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return folder


def zeros_of(path: Path) -> dict[str, torch.Tensor]:
    """Where the layers of a checkpoint are zero, as stock Transformers loads them."""
    model = Checkpoint(path).load()
    return {name: module.weight == 0 for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name.replace(" ", "-"))
def test_a_pair_keeps_its_invariants_or_is_refused(first: str, second: str, place: Path, tracking_uri: str) -> None:
    steps = ["  - calibrate: text\n    with: {source: text.txt, sequences: 8, length_tokens: 32}\n"]
    classes = {f"{method.cls.stage} {method.cls.name}": method.cls for method in methods().installed.values()}
    # What trains a grid is tried on one; nothing else comes before the pair.
    before_all = ("quantize rtn",) if Invariant.GRID in classes[first].requires else ()
    for name in (*before_all, first, second):
        stage, method = name.split()
        steps.append(f"  - {stage}: {method}\n    with: {PARAMETERS[name]}\n")
    path = place / "pair.yaml"
    path.write_text(f"version: 1\nname: pair\nmodel: {{id: model}}\nsteps:\n{''.join(steps)}", encoding="utf-8")
    settings = Settings(place / "home", tracking_uri)
    established = frozenset().union(*(classes[name].provides for name in (*before_all, first)))
    if lost := classes[second].requires - established:
        with pytest.raises(SpecError, match=rf"{second} .* has a {next(iter(lost))} already, and no step before"):
            make_plan(path, methods(), settings.home)
        return
    if established - classes[second].keeps:
        owner = "|".join((*before_all, first))
        lost = "(zeros|grid|kv_scales)"
        with pytest.raises(SpecError, match=rf"{second} would destroy the {lost} that ({owner}) established"):
            make_plan(path, methods(), settings.home)
        return
    document = run_locally(path, methods(), settings, Watcher()).document()
    store = ArtifactStore(settings.home)
    before, after = (store.find(step["artifact"]["digest"]) for step in document["steps"][-2:])
    if Invariant.ZEROS in established:
        assert "zeros" in after.manifest["invariants"]
        kept = zeros_of(after.path)
        if second != "prune depth":  # whose layers have other numbers; the core compares them through these
            for name, zero_OI in zeros_of(before.path).items():
                assert not bool((zero_OI & ~kept[name]).any()), name
        if Invariant.ZEROS not in classes[second].provides:
            patterns = [artifact.manifest["invariants"]["zeros"]["pattern"] for artifact in (before, after)]
            assert patterns[0] == patterns[1]
    if Invariant.GRID in established & classes[second].keeps:  # the layers that are left are stored by the same schemes
        grids = [artifact.manifest["invariants"]["grid"] for artifact in (before, after)]
        assert grids[0] == grids[1] or (second == "prune depth" and "schemes" in grids[0])
    if Invariant.KV_SCALES in classes[second].provides:
        assert after.manifest["invariants"]["kv_scales"]["layers"] == len(read_kv_scales(Checkpoint(after.path))) > 0
    if Invariant.GRID in classes[second].provides:
        grid = after.manifest["invariants"]["grid"]
        if second == "quantize mixed":
            assert {scheme["num_bits"] for scheme in grid["schemes"]} <= {2, 4, 8} and len(grid["schemes"]) > 1
        else:
            assert grid["num_bits"] == (8 if second in ("quantize smoothquant", "quantize fp8") else 4)
