"""Which steps of a plan have their result in the store; and for those that have not, why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.artifact import Artifact, ArtifactStore
from orchestrator.canonical import canonical_json, write_atomically
from orchestrator.errors import OrchestratorError
from orchestrator.method import Publisher
from orchestrator.plan import Plan
from orchestrator.published import released


@dataclass(frozen=True)
class StepStatus:
    """Whether a step's result is in the store; if not, why."""

    artifact: Artifact | None
    why: str | None


def statuses(plan: Plan, store: ArtifactStore) -> list[StepStatus]:
    """For every step whether its result is in the store, and if not, why. Reads manifests, not weights."""
    earlier = _remembered(plan, store.home)
    found = []
    for step in plan.steps:
        artifact = store.lookup(step.fingerprint)
        why = None
        if artifact is None:
            if store.record(step.fingerprint):
                why = "its artifact is gone or its manifest is damaged"
            elif step.index < len(earlier) and _differences(earlier[step.index], step.identity):
                why = "changed: " + ", ".join(_differences(earlier[step.index], step.identity))
            else:
                why = "not run yet"
        elif any(
            not (path := artifact.path / name).is_file() or path.stat().st_size != entry["bytes"]
            for name, entry in artifact.manifest["files"].items()
        ):
            artifact, why = None, "its artifact is damaged"
        elif isinstance(step.method, Publisher):
            why = _release_gone(step.method, artifact)
            artifact = None if why else artifact
        found.append(StepStatus(artifact, why))
    return found


def _release_gone(publisher: Publisher, artifact: Artifact) -> str | None:
    release = released(artifact)
    try:
        found = publisher.find(release["name"])
    except OrchestratorError as error:
        return str(error)
    complete = found is not None and found.digest == release["digest"]
    return None if complete else f"its release is no longer at {release['uri']}"


def remember(plan: Plan, home: Path) -> None:
    """Keep what decided each step, so that the next plan of this name can say what has changed."""
    path = home / "plans" / f"{plan.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canonical_json([step.identity for step in plan.steps]))


def _remembered(plan: Plan, home: Path) -> list[Mapping[str, Any]]:
    try:
        return list(json.loads((home / "plans" / f"{plan.name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what differs between two identities."""
    names = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(prefix + key)
    return names
