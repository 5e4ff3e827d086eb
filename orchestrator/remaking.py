"""Making the models of variants while an evaluator is at work: one at a time, in its scratch folder.

What is in the store already is taken from there, as `orchestrator.run` takes it: every byte read, made from the same
inputs. What is made here never enters the store and is gone when it was measured; the evaluator keeps the numbers. So
a grid of calibrations takes the disk of one model, and a killed step goes on at the variant where it died.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.artifact import CACHE, Artifact, ArtifactStore, model_digest
from orchestrator.calibration import CalibrationSet
from orchestrator.canonical import canonical_json
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.method import Calibrator
from orchestrator.plan import SOURCE, Plan, Step
from orchestrator.recalibration import Progress, Remade, Variant
from orchestrator.steps import StepInputs, perform
from orchestrator.variants import VariantPlan


@dataclass(frozen=True)
class _Made:
    """The result of a variant's step. artifact: None if it was made here."""

    path: Path
    digest: str  # of the model's bytes; of no account for a calibration set
    invariants: Mapping[str, Any]
    artifact: str | None


@dataclass(frozen=True)
class Maker:
    """Makes variants of a plan.

    workers: of a step's walk, by index; their number changes no bit. scratch: an empty folder.
    """

    plan: Plan
    store: ArtifactStore
    scratch: Path
    workers: Callable[[int], int | None]

    def variants(self, step: Step) -> tuple[Variant, ...]:
        """What the evaluator of `step` finds in its context."""
        return tuple(Variant(found.asked, found.key, partial(self._remade, found)) for found in step.variants)

    @contextmanager
    def _remade(self, variant: VariantPlan, progress: Progress) -> Iterator[Remade]:
        folder = self.scratch / "variant"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made: dict[int, _Made] = {}
            for place, step in enumerate(variant.steps):
                part = partial(_advanced, progress, place / len(variant.steps), 1 / len(variant.steps), step.label)
                with _named(variant.asked.name, step):
                    made[step.index] = self._found(step, made) or self._make(
                        step, made, variant.asked.seed, folder / str(step.index), part
                    )
                self._forget_inputs(step, made)
            last = variant.steps[-1]
            drawn = max(step.index for step in variant.steps if isinstance(step.method, Calibrator))
            yield Remade(
                Checkpoint(made[last.index].path, code=self.plan.source.code), CalibrationSet.load(made[drawn].path)
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _found(self, step: Step, made: Mapping[int, _Made]) -> _Made | None:
        """The step's artifact, if it is whole and its inputs are those of this variant."""
        artifact = self.store.lookup(step.fingerprint)
        expected = {
            role: self.plan.source_digest if at == SOURCE else made[at].artifact for role, at in step.inputs.items()
        }
        if artifact is None or artifact.manifest["inputs"] != expected or artifact.damage():
            return None
        return _Made(artifact.path, _model_digest(step, artifact), artifact.manifest["invariants"], artifact.digest)

    def _make(self, step: Step, made: Mapping[int, _Made], seed: int, folder: Path, progress: Progress) -> _Made:
        result, scratch, state = (folder / name for name in ("result", "scratch", "state"))
        for path in (result, scratch, state):
            path.mkdir(parents=True)
        at = step.inputs["model"]
        source = None if at == SOURCE else made[at]
        calibration = step.inputs.get("calibration")
        facts = perform(
            step,
            StepInputs(
                model=self.plan.source if source is None else Checkpoint(source.path, code=self.plan.source.code),
                dense=self.plan.source,
                calibration=None if calibration is None else CalibrationSet.load(made[calibration].path),
                invariants={} if source is None else source.invariants,
                seed=seed,
                scratch=scratch,
                progress=progress,
                model_digest=self.plan.source_digest if source is None else source.digest,
                state=state,
                statistics=self.store.home / "statistics",
                cache=self.store.home / CACHE,
                workers=self.workers(step.index),
            ),
            result,
        )
        for path in (scratch, state):
            shutil.rmtree(path, ignore_errors=True)
        digest = Checkpoint(result, code=self.plan.source.code).digest() if step.makes_model else ""
        return _Made(result, digest, json.loads(canonical_json(dict(facts.invariants))), None)

    def _forget_inputs(self, step: Step, made: Mapping[int, _Made]) -> None:
        """Remove the model that the step read, if it was made here: nothing reads it any more."""
        at = step.inputs["model"]
        if step.makes_model and at != SOURCE and made[at].artifact is None:
            shutil.rmtree(made[at].path, ignore_errors=True)


def _advanced(progress: Progress, begin: float, share: float, label: str, fraction: float, message: str) -> None:
    progress(begin + share * fraction, f"{label}: {message}")


@contextmanager
def _named(variant: str, step: Step) -> Iterator[None]:
    """Let what goes wrong say in which variant it did."""
    try:
        yield
    except OrchestratorError as error:
        problems = [Problem(f"variant {variant}, {step.label}: {p.what}", p.where, p.remedy) for p in error.problems]
        raise type(error)(problems) from error
    except Exception as error:
        error.add_note(f"variant {variant}, {step.label}")
        raise


def _model_digest(step: Step, artifact: Artifact) -> str:
    return model_digest(artifact) if step.makes_model else ""
