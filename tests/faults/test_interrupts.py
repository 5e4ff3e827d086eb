"""Ctrl-C, a full disk and full memory keep the progress of a walk; a fault of the method takes it away."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.faults.points import Point
from tests.faults.scene import Scene


def _staged(scene: Scene) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in (scene.home / "staging").iterdir())


@pytest.mark.parametrize(
    ("event", "number"), [("HiddenStates.write", 5), ("Shards.write", 8), ("WalkProgress.finish", 2)]
)
def test_an_interrupted_run_goes_on(scene_of: Callable[[str], Scene], event: str, number: int) -> None:
    scene = scene_of("gptq")
    scene.start_again()
    assert scene.run(Point(event, number, "before", "interrupt"))["exit"] == 130
    assert _staged(scene) == ["", "state"]
    assert not scene.faults(scene.run())
    assert (scene.worked().blocks - scene.work.blocks).total() <= 1


@pytest.mark.parametrize(
    ("event", "number"), [("HiddenStates.write", 5), ("Shards.write", 8), ("WalkProgress.finish", 2)]
)
def test_a_full_disk_keeps_the_progress(scene_of: Callable[[str], Scene], event: str, number: int) -> None:
    scene = scene_of("gptq")
    scene.start_again()
    answer = scene.run(changes=[["disk_full", event, number]])
    assert answer["exit"] == 1 and "No space left on device" in answer["errors"]
    assert _staged(scene) == ["", "state"]
    assert not scene.faults(scene.run())
    assert (scene.worked().blocks - scene.work.blocks).total() == 1


@pytest.mark.parametrize("event", ["save_file", "Path.replace"])
def test_a_disk_too_full_for_statistics_stops_nothing(scene_of: Callable[[str], Scene], event: str) -> None:
    """Records are a cache. (The first file that is saved is the calibration set; replaced is one of the first.)"""
    scene = scene_of("gptq")
    scene.start_again()
    assert not scene.faults(scene.run(changes=[["disk_full", event, 5]]))
    assert scene.worked().blocks == scene.work.blocks


@pytest.mark.parametrize("group", [1, 6])
def test_a_fault_of_the_method_leaves_nothing(scene_of: Callable[[str], Scene], group: int) -> None:
    scene = scene_of("gptq")
    scene.start_again()
    answer = scene.run(changes=[["method_fails", group]])
    assert answer["exit"] == 1 and "as the test wants" in answer["errors"]
    assert _staged(scene) == []
    assert not scene.faults(scene.run())


def test_memory_that_runs_out_keeps_the_progress(scene_of: Callable[[str], Scene]) -> None:
    scene = scene_of("gptq")
    scene.start_again()
    answer = scene.run(changes=[["method_fails", 6, "memory"]])
    assert answer["exit"] == 1 and "DefaultCPUAllocator" in answer["errors"] and "free memory" in answer["errors"]
    assert _staged(scene) == ["", "state"]
    assert not scene.faults(scene.run())
    assert (scene.worked().blocks - scene.work.blocks).total() == 1


def test_a_run_sweeps_what_others_abandoned(scene_of: Callable[[str], Scene]) -> None:
    scene = scene_of("weights only")
    scene.start_again()
    folder = scene.home / "staging" / "abandoned"
    folder.mkdir(parents=True)
    os.utime(folder, (0, 0))
    assert not scene.faults(scene.run())
