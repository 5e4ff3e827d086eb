"""Where the model that a step reads comes from: the steps of the plan that led to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.calibration import CalibrationSet
from orchestrator.method import Evaluator
from orchestrator.outcome import StepOutcome
from orchestrator.plan import SOURCE, Plan, Step
from orchestrator.steps import TRAINED_FOLDER


def made_from(plan: Plan, step: Step) -> list[Step]:
    """Return the steps that gave the model that `step` reads, first to last."""
    indices: set[int] = set()
    pending = [step.inputs["model"]]
    while pending:
        index = pending.pop()
        if index != SOURCE and index not in indices:
            indices.add(index)
            pending += plan.steps[index].inputs.values()
    return [plan.steps[index] for index in sorted(indices)]


def lineage_of(plan: Plan, step: Step, outcomes: Mapping[int, StepOutcome]) -> list[dict[str, Any]]:
    """The steps of `made_from` as a release records them."""
    return [
        {
            "stage": made.stage.value,
            "method": made.method.name,
            "parameters": made.identity["parameters"],
            "plugin": made.identity["plugin"],
            "fingerprint": made.fingerprint,
            "artifact": outcomes[made.index].digest,
        }
        for made in made_from(plan, step)
    ]


def trained_on(plan: Plan, step: Step, outcomes: Mapping[int, StepOutcome]) -> tuple[CalibrationSet, ...]:
    """What an evaluator is told of the texts that the steps before trained on; () for any other step."""
    if not isinstance(step.method, Evaluator):
        return ()
    folders = (outcomes[made.index].path / TRAINED_FOLDER for made in made_from(plan, step))
    return tuple(CalibrationSet.load(folder) for folder in folders if folder.is_dir())
