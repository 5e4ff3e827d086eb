"""Moments at which a run can die: calls that it makes, each counted, with a kill before, after or in the middle of one.

Everything is put in by replacing functions, in the process that is to die and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

import orchestrator.artifact
import orchestrator.capture
import orchestrator.hidden
import orchestrator.records
import orchestrator.resume
import orchestrator.shards

# Events by name: the owner of the function and the function's name there.
EVENTS: dict[str, tuple[Any, str]] = {
    "Shards.create": (orchestrator.shards.Shards, "create"),
    "Shards.write": (orchestrator.shards.Shards, "write_part"),
    "WalkProgress.finish": (orchestrator.resume.WalkProgress, "finish"),
    "HiddenStates.write": (orchestrator.hidden.HiddenStates, "write"),
    "HiddenStates.remove": (orchestrator.hidden.HiddenStates, "remove"),
    "RecordStore.save": (orchestrator.records.RecordStore, "save"),
    "RecordStore.save_index": (orchestrator.records.RecordStore, "save_index"),
    "Stream.discard_passed": (orchestrator.capture.Stream, "discard_passed"),
    "ArtifactStore.stage": (orchestrator.artifact.ArtifactStore, "stage"),
    "ArtifactStore.unstage": (orchestrator.artifact.ArtifactStore, "unstage"),
    "ArtifactStore.commit": (orchestrator.artifact.ArtifactStore, "commit"),
    "commit: sync_tree": (orchestrator.artifact, "sync_tree"),
    "commit: write_atomically": (orchestrator.artifact, "write_atomically"),
    "os.fsync": (os, "fsync"),
    "os.link": (os, "link"),
    "os.posix_fallocate": (os, "posix_fallocate"),
    "Path.replace": (Path, "replace"),
    "Path.rename": (Path, "rename"),
    "Path.unlink": (Path, "unlink"),
    "Path.mkdir": (Path, "mkdir"),
    "shutil.rmtree": (shutil, "rmtree"),
    # Those that can also be torn: half of the bytes get written.
    "os.write": (os, "write"),
    "os.pwrite": (os, "pwrite"),
    "Path.write_text": (Path, "write_text"),
    "Path.write_bytes": (Path, "write_bytes"),
    "shutil.copyfile": (shutil, "copyfile"),
    "save_file": (safetensors.torch, "save_file"),
}
_MULTIPLE = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}


@dataclass(frozen=True)
class Point:
    """The `number`-th (from 1) occurrence of an event; when: "before", "after" or "half"; signal: as in `kill`."""

    event: str
    number: int
    when: str
    signal: str = "kill"

    def __str__(self) -> str:
        return f"{self.when} {self.event} {self.number}"


class Tally:
    """Counts events from the moment it is put in, and strikes at one point."""

    def __init__(self, point: Point | None, strike: Callable[[], None] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._point = point
        self._lock = threading.Lock()
        number = _MULTIPLE[point.signal] if point else signal.SIGKILL
        self._strike = strike or (lambda: os.kill(os.getpid(), number))

    def put_in(self) -> None:
        """Replace the functions."""
        for event, (owner, name) in EVENTS.items():
            setattr(owner, name, self._watched(event, getattr(owner, name)))

    def _watched(self, event: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.counts[event] += 1
                point = self._point
                here = point is not None and point.event == event and point.number == self.counts[event]
            if not here or point is None:
                return real(*args, **kwargs)
            if point.when == "half":
                TORN[event](real, *args)
            if point.when != "after":
                self._strike()
            result = real(*args, **kwargs)
            if point.when == "after":
                self._strike()
            return result

        return call


def _half_text(real: Callable[..., Any], path: Path, content: Any, *rest: Any) -> None:
    real(path, content[: len(content) // 2], *rest)


def _half_copy(real: Callable[..., Any], source: Any, target: Any) -> None:
    real(source, target)
    _cut(target)


def _half_save(real: Callable[..., Any], tensors: Any, path: Any, *rest: Any) -> None:
    real(tensors, path, *rest)
    _cut(path)


def _cut(path: Any) -> None:
    os.truncate(path, Path(path).stat().st_size // 2)


TORN: dict[str, Callable[..., None]] = {
    "os.write": lambda real, descriptor, data: real(descriptor, data[: len(data) // 2]),
    "os.pwrite": lambda real, descriptor, data, offset: real(descriptor, data[: len(data) // 2], offset),
    "Path.write_text": _half_text,
    "Path.write_bytes": _half_text,
    "shutil.copyfile": _half_copy,
    "save_file": _half_save,
}


def all_points(counts: Counter[str] | dict[str, int]) -> list[Point]:
    """Every point of a run with these counts."""
    return [
        Point(event, number, when)
        for event, count in sorted(counts.items())
        for number in range(1, count + 1)
        for when in ("before", "after", "half")
        if when != "half" or event in TORN
    ]


def short_list(counts: Counter[str] | dict[str, int], per_event: int) -> list[Point]:
    """Points of every event, spread evenly over its occurrences."""
    chosen = []
    for event, count in sorted(counts.items()):
        kinds = ["before", "after", "half"] if event in TORN else ["before", "after"]
        for turn in range(min(per_event, count)):
            number = 1 + turn * (count - 1) // max(1, min(per_event, count) - 1)
            chosen.append(Point(event, number, kinds[(turn + len(event)) % len(kinds)]))
    return chosen


def import_targets() -> None:
    """Import what a run imports late, so that a fork finds it in memory; compute nothing."""
    for name in (
        "compressed_tensors",
        "mlflow.store.model_registry.sqlalchemy_store",
        "mlflow.store.tracking.sqlalchemy_store",
        "mlflow.tracking._model_registry.client",
        "orchestrator.export",
        "orchestrator.invariants",
        "orchestrator.run",
        "orchestrator.skeleton",
        "orchestrator.walk",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(name)
    import sqlalchemy.orm
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from orchestrator.plugins import discover

    _ = AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, discover()
    sqlalchemy.orm.configure_mappers()
