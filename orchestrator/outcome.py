"""What a run did for one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.gates import GateResult


@dataclass(frozen=True)
class StepOutcome:
    """What a run did for one step. `seconds` and `peak_memory_bytes` are this run's, also for a cached step.

    import_seconds: the part of `seconds` in which libraries were imported.
    disk_bytes: of the artifact. predicted: the same numbers as they were foreseen; None for a cached step.
    gates: the step's bounds and what they were held against.
    zeros: of a pruned model, what its zeros are worth (`orchestrator.zeros`).
    """

    stage: str
    method: str
    fingerprint: str
    cached: bool
    seconds: float
    peak_memory_bytes: int
    digest: str
    path: Path
    metrics: Mapping[str, float]
    import_seconds: float = 0.0
    disk_bytes: int = 0
    predicted: Mapping[str, Any] | None = None
    peak_device_bytes: int | None = None
    zeros: str | None = None
    gates: tuple[GateResult, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The form that `run --json` prints."""
        return {
            "stage": self.stage,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "cached": self.cached,
            "seconds": round(self.seconds, 4),
            "import_seconds": round(self.import_seconds, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            **({} if self.peak_device_bytes is None else {"device_memory_bytes": self.peak_device_bytes}),
            "predicted": None if self.predicted is None else dict(self.predicted),
            "artifact": {"digest": self.digest, "path": str(self.path)},
            "metrics": dict(self.metrics),
            **({} if self.zeros is None else {"zeros": self.zeros}),
            **({"gates": [gate.as_dict() for gate in self.gates]} if self.gates else {}),
        }


def unchanged(outcomes: Mapping[int, StepOutcome]) -> bool:
    """Whether every step was found in the store: nothing was computed, published or registered."""
    return all(outcome.cached for outcome in outcomes.values())
