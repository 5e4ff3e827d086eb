"""What orchestration costs per computed step: a method that does nothing, 100 times, through `Execution.run_step`.

    python -m benchmarks.steps [--steps 100]

The plan is a pruned tiny model and evaluators that return a constant, so what a step takes is orchestration: the
lease, journal, staging, hashing and committing of the artifact with every fsync, and the record in MLflow (a sqlite
database), which is counted for itself. A part's time excludes the parts inside it. Nothing is turned off.
MLflow's database flushes by itself; "fsync" is what the store and the journal do.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from orchestrator.api import Checkpoint, Context, Evaluator, Stage
from orchestrator.home import Settings
from orchestrator.outcome import StepOutcome
from orchestrator.plan import Plan, Step
from orchestrator.plugins import InstalledMethod, Origin, discover
from orchestrator.quickstart import prepare
from orchestrator.run import finishing, start

HEAD = """\
version: 1
name: steps
model: {id: model}
steps:
  - prune: magnitude
    with: {sparsity: 0.5}
"""
# Part -> where it happens. What is left of a step is "the rest": the method, its inputs, outcome and observer.
PARTS = {
    "MLflow": ("orchestrator.record.RunRecord.step",),
    "fsync": ("os.fsync",),
    "commit (hashing, manifest, renames)": ("orchestrator.artifact.ArtifactStore.commit",),
    "journal": ("orchestrator.journal.Journal.write",),
    "staging": ("orchestrator.artifact.ArtifactStore.stage", "orchestrator.artifact.ArtifactStore.unstage"),
    "looking in the store": ("orchestrator.run.Execution._cached",),
    "inputs": ("orchestrator.run.Execution._inputs", "orchestrator.run.Execution._input_digests"),
    "memory and time": ("orchestrator.run.Usage", "orchestrator.usage.Usage.peak_memory_bytes"),
}


class Nothing(Evaluator):
    """Measures nothing."""

    stage: ClassVar[Stage] = Stage.VALIDATE
    name: ClassVar[str] = "nothing"
    paper: ClassVar[str] = "none: for the benchmark"
    metrics: ClassVar[Mapping[str, str]] = {"nothing": "a constant"}
    number: int = 0

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        return {"nothing": 1.0}


class Silent:
    """Watches and says nothing."""

    def run_started(self, run_id: str, plan: Plan) -> None: ...

    def step_started(self, step: Step) -> None: ...

    def step_progress(self, step: Step, fraction: float, message: str) -> None: ...

    def step_finished(self, step: Step, outcome: StepOutcome) -> None: ...

    def note(self, message: str) -> None: ...


class Ledger:
    """Seconds and calls by part. What happens inside an inner part is the inner one's time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner: list[float] = []

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, its time booked to `part`."""

        @functools.wraps(function, updated=())
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inner.pop()
                self.calls[part] += 1
                if self._inner:
                    self._inner[-1] += took

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Book the time of all `PARTS` while the block runs."""
        patches = []
        for part, places in PARTS.items():
            for place in places:
                owner, _, name = place.rpartition(".")
                found = _resolve(owner)
                value = vars(found)[name]
                timed: Any
                if isinstance(value, property) and value.fget:
                    timed = property(self.wrap(part, value.fget))
                else:
                    timed = self.wrap(part, value)
                patches.append(patch.object(found, name, timed))
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


def _resolve(place: str) -> Any:
    try:
        return __import__(place, fromlist=["_"])
    except ImportError:
        owner, _, name = place.rpartition(".")
        return getattr(_resolve(owner), name)


def measure(steps: int) -> dict[str, Any]:
    """Run that many steps; return medians and means in milliseconds per step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        spec = folder / "steps.yaml"
        lines = (f"  - validate: nothing\n    with: {{number: {number}}}\n" for number in range(steps))
        spec.write_text(HEAD + "".join(lines), encoding="utf-8")
        methods = discover()
        methods.add([InstalledMethod(Nothing, Origin("nothing", "benchmarks", "0"))])
        settings = Settings(folder / "home", f"sqlite:///{folder / 'home' / 'mlflow.db'}")
        execution = start(spec, methods, settings, Silent(), "benchmark")
        totals, records = [], []
        ledger = Ledger()
        with finishing(execution):
            execution.run_step(0)  # imports torch and MLflow, makes the database
            with ledger.watching():
                for step in execution.plan.steps[1:]:
                    recorded, began = ledger.seconds["MLflow"], time.perf_counter()
                    if execution.run_step(step.index).cached:
                        raise RuntimeError("nothing was computed, so nothing was measured")
                    totals.append(time.perf_counter() - began)
                    records.append(ledger.seconds["MLflow"] - recorded)
    without = [total - record for total, record in zip(totals, records, strict=True)]
    means = {part: 1000 * ledger.seconds[part] / steps for part in PARTS}
    return {
        "steps": steps,
        "median_ms": round(1000 * statistics.median(totals), 2),
        "median_ms_without_mlflow": round(1000 * statistics.median(without), 2),
        "p95_ms_without_mlflow": round(1000 * statistics.quantiles(without, n=20)[-1], 2),
        "mean_ms_by_part": {
            **{part: round(mean, 2) for part, mean in means.items()},
            "the rest": round(1000 * statistics.mean(totals) - sum(means.values()), 2),
        },
        "calls_per_step": {part: round(ledger.calls[part] / steps, 1) for part in PARTS},
        "load": round(os.getloadavg()[0], 2),
    }


def show(result: Mapping[str, Any]) -> None:
    """Print what was measured."""
    print(f"\nper computed step, {result['steps']} steps that do nothing, ms")
    print(f"{'median, MLflow aside':<38}{result['median_ms_without_mlflow']:>10.2f}  (target: at most 20)")
    print(f"{'95th percentile, MLflow aside':<38}{result['p95_ms_without_mlflow']:>10.2f}")
    print(f"{'median, with MLflow':<38}{result['median_ms']:>10.2f}")
    for part, mean in result["mean_ms_by_part"].items():
        calls = result["calls_per_step"].get(part)
        print(f"  mean of {part:<38}{mean:>8.2f}" + (f"  in {calls:g} calls" if calls else ""))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    show(measure(parser.parse_args().steps))


if __name__ == "__main__":
    main()
