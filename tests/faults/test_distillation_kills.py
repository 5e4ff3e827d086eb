"""`kill -9` while a student is trained: the next run goes on after the last state, and ends in the very same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import CALIBRATE, GPTQ, HEAD, WANDA
from tests.faults.points import Point
from tests.faults.scene import Scene
from tests.faults.zygote import Zygote

CHAIN = (
    HEAD
    + CALIBRATE
    + WANDA
    + "  - distill: logits\n    with: {updates: 6, batch_sequences: 2, teacher_top_k: 8}\n"
    + GPTQ
    + "  - distill: qad\n    with: {updates: 6, batch_sequences: 2, examine_every: 2}\n"
    + "  - distill: minillm\n"
    + "    with: {updates: 6, batch_sequences: 2, length_tokens: 32, prompt_tokens: 8, answer_tokens: 6, reuse: 4}\n"
)


@pytest.fixture(scope="module")
def scene(zygote: Zygote, material: Path) -> Scene:
    spec = material / "distillation.yaml"
    spec.write_text(CHAIN, encoding="utf-8")
    return Scene(material / "scene distillation", spec, zygote, changes=[("save_often",)])


@pytest.mark.parametrize(
    ("share", "when"), [(0.1, "half"), (0.2, "after"), (0.4, "half"), (0.6, "before"), (0.8, "half"), (0.95, "after")]
)
def test_training_goes_on_after_a_kill(scene: Scene, share: float, when: str) -> None:
    """A state, the best parameters or the teacher's cache are half written, or just written."""
    number = 1 + round(share * (scene.counts["save_file"] - 1))
    trial = scene.trial([Point("save_file", number, when)], count=False)
    assert trial.kills == 1
    assert not trial.faults


def test_training_that_is_killed_again_and_again_comes_to_its_end(scene: Scene) -> None:
    kills = [Point("save_file", 4, "half"), Point("Path.replace", 9, "before"), Point("Path.replace", 12, "after")]
    trial = scene.trial([*kills, *kills], count=False)
    assert trial.kills == len(kills) * 2
    assert not trial.faults
