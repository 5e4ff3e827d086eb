"""One run of a specification that may die on the way, and what it writes down about itself until then."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.faults.points import Point, Tally


class Quiet:
    """An observer that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


class Untracked:
    """Stands for the record in MLflow, which takes most of the time of a tiny run."""

    def __init__(self, *args: Any) -> None:
        self.mlflow_run: str | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def run(request: Mapping[str, Any]) -> int:
    """Run as `request` says; return the exit code. Writes lines to the file `log` and, at the end, `result`."""
    log = Path(request["log"])
    if request.get("show_threads"):
        import torch

        return torch.get_num_threads()
    _count_work(log)
    if not request.get("tracked"):
        import orchestrator.run

        orchestrator.run.RunRecord = Untracked  # type: ignore[misc,assignment]
    for change in request.get("changes", []):
        CHANGES[change[0]](*change[1:])
    tally = Tally(Point(*request["point"]) if request.get("point") else None)
    tally.put_in()
    try:
        document = _run(Path(request["spec"]), Path(request["home"]))
    except BaseException as error:
        _write(log, "error", f"{type(error).__name__}: {error}")
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc(file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    Path(request["result"]).write_text(
        json.dumps({"document": document, "counts": dict(tally.counts)}), encoding="utf-8"
    )
    return 0


def _run(spec: Path, home: Path) -> Any:
    from orchestrator.home import Settings
    from orchestrator.plugins import discover
    from orchestrator.run import run_locally

    settings = Settings(home, f"sqlite:///{home / 'mlflow.db'}")
    return run_locally(spec, discover(), settings, Quiet()).document()


def _write(log: Path, *facts: Any) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def _count_work(log: Path) -> None:
    """Note every block that is begun and every pass of all tokens through a block."""
    from orchestrator.capture import Stream
    from orchestrator.walk import _Walk

    def noted(owner: Any, name: str, kind: str) -> None:
        real = getattr(owner, name)

        def call(self: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
            _write(log, kind, getattr(getattr(self, "method", None), "name", None), block.name)
            return real(self, block, *args, **kwargs)

        setattr(owner, name, call)

    noted(_Walk, "_with_tokens", "block")
    noted(_Walk, "_without_tokens", "block")
    noted(Stream, "_pass", "pass")


def _change_code() -> None:
    """As if a source file of the core were another."""
    import orchestrator.plan as plan

    real = plan.package_digest
    plan.package_digest = lambda *args: real(*args)[::-1]


def _change_library() -> None:
    """As if another torch were installed."""
    import orchestrator.plan as plan

    versions = {**plan.library_versions(), "torch": "0.0"}
    plan.library_versions = lambda: versions  # type: ignore[assignment]


def _change_processor() -> None:
    """As if the processor had other instructions."""
    import orchestrator.job as job

    job.machine_facts = lambda device: {"cpu": "ENIAC", "threads_of_an_operation": 1}  # type: ignore[assignment]


def _batch_tokens(count: int) -> None:
    """Small batches, so that a small calibration set has several."""
    from orchestrator.capture import BATCH_TOKENS

    BATCH_TOKENS["cpu"] = count


def _workers(count: int) -> None:
    """A number of workers of its own."""
    import orchestrator.walk as walk

    real = walk.Workers
    walk.Workers = lambda number: real(count)  # type: ignore[assignment,misc]


def _disk_full(owner_name: str, number: int) -> None:
    """The `number`-th call of an event of `points.EVENTS` finds the disk full."""
    import errno
    import threading

    from tests.faults.points import EVENTS

    owner, name = EVENTS[owner_name]
    real, lock, calls = getattr(owner, name), threading.Lock(), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            calls[0] += 1
            full = calls[0] == number
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    setattr(owner, name, call)


def _method_fails(number: int, how: str = "by itself") -> None:
    """The method raises at the `number`-th group of layers; how: or torch finds no "memory"."""
    import torch

    from orchestrator.compression import LayerCompressor
    from orchestrator.errors import StepError

    real, calls = LayerCompressor.compress, [0]

    def call(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            if how == "memory":
                torch.empty(1 << 50)
            raise StepError("as the test wants")
        return real(self, *args)

    LayerCompressor.compress = call  # type: ignore[method-assign]


def _save_often() -> None:
    """A state after every update of training."""
    from orchestrator_distillation import resuming

    resuming.SAVE_SECONDS = resuming._SHARE = 0.0


CHANGES: dict[str, Callable[..., None]] = {
    "code": _change_code,
    "library": _change_library,
    "processor": _change_processor,
    "batch_tokens": _batch_tokens,
    "workers": _workers,
    "disk_full": _disk_full,
    "method_fails": _method_fails,
    "save_often": _save_often,
}
