"""What a run did for one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepOutcome:
    """What a run did for one step. `seconds` and `peak_memory_bytes` are this run's, also for a cached step."""

    stage: str
    method: str
    fingerprint: str
    cached: bool
    seconds: float
    peak_memory_bytes: int
    digest: str
    path: Path
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The form that `run --json` prints."""
        return {
            "stage": self.stage,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "cached": self.cached,
            "seconds": round(self.seconds, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
            "artifact": {"digest": self.digest, "path": str(self.path)},
            "metrics": dict(self.metrics),
        }
