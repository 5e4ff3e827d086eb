"""What a run's journal keeps of its plan: what was to be done, with which bounds, and where. Decides no result."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from orchestrator.machine import num_threads
from orchestrator.plan import Plan
from orchestrator.remote_code import recorded_code


def journal_facts(plan: Plan) -> dict[str, Any]:
    """Return the plan and the machine as JSON values. Bounds are here because no artifact has them."""
    return {
        "pipeline": plan.name,
        "spec": str(plan.spec_path),
        "model": str(plan.source.path),
        "model_digest": plan.source_digest,
        **recorded_code(plan.source.code),
        "seed": plan.seed,
        "machine": {
            "orchestrator": version("compression-orchestrator"),
            "python": platform.python_version(),
            "system": f"{os.uname().sysname} {os.uname().release} {os.uname().machine}",
            "threads": num_threads(os.environ),
        },
        "steps": [
            {
                "stage": step.stage.value,
                "method": step.method.name,
                "fingerprint": step.fingerprint,
                "place": step.place,
                "demands": {
                    "require": {metric: dict(bound) for metric, bound in step.require.items()},
                    "must_not_fall": list(step.must_not_fall),
                },
            }
            for step in plan.steps
        ],
    }
