"""The register stage: bundle, publish, then a version in the model registry that points at the release."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.bundle import bundle_digest, document_bundle, write_bundle
from orchestrator.deployment import PLAN_FILE, kv_metrics
from orchestrator.errors import GateError
from orchestrator.formats import write_formats
from orchestrator.gates import gate_problems, gate_results, read_intervals
from orchestrator.method import Publisher, Stage
from orchestrator.outcome import StepOutcome
from orchestrator.plan import Plan, Step
from orchestrator.plugins import library_versions
from orchestrator.provenance import Evidence, Provenance, describe_source
from orchestrator.published import PUBLISHED_FILE
from orchestrator.record import RunRecord
from orchestrator.remote_code import KEY, recorded_code
from orchestrator.serving import ModelShape
from orchestrator.steps import StepFacts, StepInputs, finite
from orchestrator.zeros import zeros_note


def release_step(
    plan: Plan,
    step: Step,
    inputs: StepInputs,
    lineage: Sequence[Mapping[str, Any]],
    record: RunRecord,
    folder: Path,
    outcomes: Mapping[int, StepOutcome],
) -> StepFacts:
    """Publish the model of `inputs` and register it; write what was published into `folder`.

    The release's name follows from its content alone, so that releasing the same again, after a crash for instance,
    finds its own release. outcomes: of the steps before; what validate steps measured goes into the model card.
    Raises `PublishError`.
    """
    publisher = step.method
    if not isinstance(publisher, Publisher):
        raise TypeError(f"{step.label} is no publisher")
    bundle = inputs.scratch / "bundle"
    bundle.mkdir()
    inputs.progress(0.0, "bundling")
    fits = {}
    if step.engines:
        fits = kv_metrics(step.engines, ModelShape.from_config(inputs.model.config), inputs.model.weight_bytes())
    remedy = "nothing was registered; compress further, or plan with more memory or shorter sequences"
    held = gate_results(step, fits, None)
    refused = gate_problems(step, held, remedy)
    if refused:
        raise GateError(refused)
    note = zeros_note(inputs.model, inputs.invariants)
    write_bundle(inputs.model, step.engines, bundle)
    written = write_formats(step.formats, inputs.model, bundle, inputs.invariants, inputs.context())
    measured = finite("formats", written)  # before anything is published
    fitted = Evidence.of(publisher.name, {}, [result.as_dict() for result in held])
    provenance = _provenance(plan, step, lineage, [*_evidence(plan, step, outcomes), fitted], note)
    document_bundle(bundle, plan.source, inputs.model, provenance)
    content = bundle_digest(bundle)
    manifest = {
        "schema": 1,
        "pipeline": plan.name,
        "source_model": plan.source_digest,
        "content": content,
        "lineage": list(lineage),
        "invariants": dict(inputs.invariants),
        **({"zeros": note} if note else {}),
        **recorded_code(plan.source.code),
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
            **({"orchestrator.signed_by": provenance.signed_by} if provenance.signed_by else {}),
            **({f"orchestrator.{KEY}": plan.source.code.described()[:4000]} if plan.source.code else {}),
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
        "signed_by": provenance.signed_by,
        "files": [{"key": file.key, "sha256": file.sha256, "bytes": file.bytes} for file in release.files],
    }
    for kept in sorted(bundle.glob(f"serving/*/{PLAN_FILE}")):  # for reports, which do not ask the store of a release
        copy = folder / kept.relative_to(bundle)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(kept.read_bytes())
    (folder / PUBLISHED_FILE).write_text(json.dumps(published, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sizes = {"files": len(release.files), "bytes": sum(file.bytes for file in release.files)}
    return StepFacts("release", {**sizes, **measured, **fits}, {})


def _evidence(plan: Plan, step: Step, outcomes: Mapping[int, StepOutcome]) -> list[Evidence]:
    """What the validate steps before measured on the model that is released."""
    validated = [
        outcomes[other.index]
        for other in plan.steps[: step.index]
        if other.stage is Stage.VALIDATE and other.inputs["model"] == step.inputs["model"] and other.index in outcomes
    ]
    return [
        Evidence.of(one.method, one.metrics, [gate.as_dict() for gate in one.gates], read_intervals(one.path))
        for one in validated
    ]


def _provenance(
    plan: Plan,
    step: Step,
    lineage: Sequence[Mapping[str, Any]],
    evidence: Sequence[Evidence],
    zeros: str | None,
) -> Provenance:
    architecture, hub_id, licence = describe_source(plan.source)
    return Provenance(
        name=plan.name,
        architecture=architecture,
        hub_id=hub_id,
        licence=licence,
        source_digest=plan.source_digest,
        lineage=lineage,
        evidence=evidence,
        libraries=library_versions(),
        engines=[engine.name for engine in step.engines],
        formats=[export.name for export in step.formats],
        zeros=zeros,
        signed_by=step.identity["parameters"].get("signing_key"),
        code=plan.source.code.files if plan.source.code else {},
    )
