"""`kill -9` at many moments: the next run redoes one block at most, and ends in the very same bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import CALIBRATE, DISTILL, GPTQ, HEAD, VALIDATE, WANDA
from tests.faults.points import Point, short_list
from tests.faults.scene import Scene
from tests.faults.zygote import Zygote

# How each event is struck, where which half of a run matters: the number is a share of how often it happens.
MOMENTS = [
    ("Shards.write", 0.5, "before"),
    ("os.pwrite", 0.7, "half"),
    ("HiddenStates.remove", 0.0, "before"),
    ("RecordStore.save", 0.6, "after"),
    ("save_file", 0.5, "half"),
    ("WalkProgress.finish", 0.0, "before"),
    ("WalkProgress.finish", 1.0, "after"),
    ("Stream.discard_passed", 0.5, "before"),
    ("os.write", 0.5, "half"),
    ("Path.write_bytes", 1.0, "half"),
    ("shutil.copyfile", 1.0, "half"),
    ("commit: write_atomically", 0.8, "after"),
    ("Path.replace", 1.0, "before"),  # between the step's record and the artifact
    ("Path.replace", 1.0, "after"),
    ("ArtifactStore.unstage", 0.7, "before"),
    ("shutil.rmtree", 1.0, "before"),
]


def _point(scene: Scene, event: str, share: float, when: str) -> Point:
    return Point(event, 1 + round(share * (scene.counts[event] - 1)), when)


@pytest.mark.parametrize(("event", "share", "when"), MOMENTS)
def test_a_run_goes_on_after_a_kill(scene_of: Callable[[str], Scene], event: str, share: float, when: str) -> None:
    scene = scene_of("propagated")
    trial = scene.trial([_point(scene, event, share, when)])
    assert trial.kills == 1
    assert not trial.faults


@pytest.mark.parametrize("chain", ["dense", "weights only"])
@pytest.mark.parametrize(
    ("event", "share", "when"),
    [("os.pwrite", 0.6, "half"), ("WalkProgress.finish", 0.5, "after"), ("Path.replace", 1.0, "before")],
)
def test_other_walks_go_on_too(
    scene_of: Callable[[str], Scene], chain: str, event: str, share: float, when: str
) -> None:
    scene = scene_of(chain)
    trial = scene.trial([_point(scene, event, share, when)], records=chain == "dense")
    assert trial.kills == 1
    assert not trial.faults


def test_every_rename_of_a_commit_can_be_the_last(scene_of: Callable[[str], Scene]) -> None:
    """Of the manifest, of the step's record and of the folder; and of the plan's memory after them."""
    scene = scene_of("weights only")
    last = scene.counts["Path.replace"]
    trials = [scene.trial([Point("Path.replace", number, "before")]) for number in range(last - 3, last + 1)]
    assert [trial.faults for trial in trials] == [[], [], [], []]
    assert [trial.kills for trial in trials] == [1, 1, 1, 1]


@pytest.mark.parametrize("chain", ["propagated", "dense"])
def test_a_run_that_is_killed_again_and_again_comes_to_its_end(scene_of: Callable[[str], Scene], chain: str) -> None:
    scene = scene_of(chain)
    kills = [Point("HiddenStates.write", 5, "before"), Point("os.write", 4, "half"), Point("Shards.write", 9, "after")]
    trial = scene.trial([*kills, *kills], records=True)
    assert trial.kills == len(kills) * 2
    assert not trial.faults


def test_a_kill_at_any_time_does_no_harm(scene_of: Callable[[str], Scene]) -> None:
    scene = scene_of("propagated")
    times = random.Random(1)
    trials = [
        scene.trial([times.uniform(0.05, 0.95) * scene.seconds for _ in range(2)], records=True) for _ in range(3)
    ]
    assert not [fault for trial in trials for fault in trial.faults]
    assert sum(trial.kills for trial in trials) > 0


@pytest.fixture(scope="module")
def released(zygote: Zygote, material: Path) -> Scene:
    """A pipeline with a step of every kind, recorded in MLflow, and homes in which only the last steps are to do."""
    text = (
        HEAD + CALIBRATE + WANDA + DISTILL + GPTQ + VALIDATE + "  - register: release\n    with: {alias: candidate}\n"
    )
    lines = text.splitlines(keepends=True)
    scene = None
    for name, end in (("calibrated", "  - prune"), ("pruned", "  - distill"), ("measured", "  - register"), ("", "")):
        spec = material / "steps.yaml"
        until = next((i for i, line in enumerate(lines) if end and line.startswith(end)), len(lines))
        spec.write_text("".join(lines[:until]), encoding="utf-8")
        if scene is None:
            scene = Scene(material / "steps", spec, zygote, tracked=True)
        else:
            assert scene.run()["exit"] == 0
        if name:
            shutil.copytree(scene.home, material / f"base-{name}")
    assert scene is not None
    scene.digests, document = scene.result()
    assert document["release"]["model_version"] == "1"
    return scene


@pytest.mark.parametrize(
    ("base", "point"),
    [
        ("calibrated", Point("ArtifactStore.commit", 1, "before")),
        ("pruned", Point("Shards.write", 12, "before")),  # distillation writes its model
        ("pruned", Point("shutil.copyfile", 2, "half")),
        ("pruned", Point("Path.write_text", 3, "half")),
        ("measured", Point("os.link", 2, "before")),  # the release's files appear by links
        ("measured", Point("os.link", 9, "after")),
        ("measured", Point("ArtifactStore.commit", 1, "before")),  # published and registered, not yet remembered
        ("measured", Point("ArtifactStore.commit", 1, "after")),
    ],
    ids=str,
)
def test_steps_that_start_again_leave_nothing_half_done(
    released: Scene, material: Path, base: str, point: Point
) -> None:
    trial = released.trial([point], base=material / f"base-{base}", count=False)
    assert trial.kills == 1
    assert not trial.faults
    _, document = released.result()
    assert document["release"]["model_version"] == "1"
    releases = released.home / "releases"
    assert not list((releases / ".incoming").iterdir())
    assert len(list((releases / "faults").iterdir())) == 1


def test_the_short_list_holds_every_event(scene_of: Callable[[str], Scene]) -> None:
    scene = scene_of("propagated")
    assert {point.event for point in short_list(scene.counts, 1)} == set(scene.counts)
