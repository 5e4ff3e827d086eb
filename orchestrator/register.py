"""The register stage: bundle, publish, then a version in the model registry that points at the release."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.bundle import bundle_digest, write_bundle
from orchestrator.formats import write_formats
from orchestrator.method import Publisher
from orchestrator.plan import Plan, Step
from orchestrator.published import PUBLISHED_FILE
from orchestrator.record import RunRecord
from orchestrator.steps import StepFacts, StepInputs, finite
from orchestrator.zeros import zeros_note


def release_step(
    plan: Plan,
    step: Step,
    inputs: StepInputs,
    lineage: Sequence[Mapping[str, Any]],
    record: RunRecord,
    folder: Path,
) -> StepFacts:
    """Publish the model of `inputs` and register it; write what was published into `folder`.

    The release's name follows from its content alone, so that releasing the same again, after a crash for instance,
    finds its own release. Raises `PublishError`.
    """
    publisher = step.method
    if not isinstance(publisher, Publisher):
        raise TypeError(f"{step.label} is no publisher")
    bundle = inputs.scratch / "bundle"
    bundle.mkdir()
    inputs.progress(0.0, "bundling")
    note = zeros_note(inputs.model, inputs.invariants)
    write_bundle(inputs.model, step.engines, bundle)
    written = write_formats(step.formats, inputs.model, bundle, inputs.invariants, inputs.context())
    measured = finite("formats", written)  # before anything is published
    content = bundle_digest(bundle)
    manifest = {
        "schema": 1,
        "pipeline": plan.name,
        "source_model": plan.source_digest,
        "content": content,
        "lineage": list(lineage),
        "invariants": dict(inputs.invariants),
        **({"zeros": note} if note else {}),
    }
    name = f"{plan.name}/{content[:16]}"
    inputs.progress(0.2, "publishing")
    release = publisher.publish(bundle, manifest, name)
    inputs.progress(0.9, "registering")
    version = record.registry.register(
        plan.name,
        source=release.uri,
        run_id=record.mlflow_run,
        tags={
            "orchestrator.digest": release.digest,
            "orchestrator.artifact": lineage[-1]["artifact"] if lineage else plan.source_digest,
            "orchestrator.fingerprint": step.fingerprint,
        },
        alias=publisher.alias,
        description=f"Compressed by the pipeline {plan.name}: "
        + (", ".join(f"{entry['stage']} {entry['method']}" for entry in lineage) or "unchanged"),
    )
    published = {
        "uri": release.uri,
        "digest": release.digest,
        "name": name,
        "model_name": plan.name,
        "model_version": version,
        "alias": publisher.alias,
        "files": [{"key": file.key, "sha256": file.sha256, "bytes": file.bytes} for file in release.files],
    }
    (folder / PUBLISHED_FILE).write_text(json.dumps(published, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sizes = {"files": len(release.files), "bytes": sum(file.bytes for file in release.files)}
    return StepFacts("release", {**sizes, **measured}, {})
