"""Chains on other calibration texts and seeds, planned: what an evaluator's `recalibrations` come to. Imports no torch.

A variant is the chain that leads to the model under validation with every calibrate step reading another text and with
another seed, nothing else. Its fingerprints are those that a specification of its own would have: a variant that is the
model itself, or that another run made, is found in the store and not computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.canonical import digest_of
from orchestrator.checks import Draft, Note, PluginFaultError, plugin_fault
from orchestrator.digests import FileDigests
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.layer_method import LayerMethod, Needs
from orchestrator.method import Calibrator, Evaluator, Method, ModelMethod
from orchestrator.parameters import marked_fields, parameters_of
from orchestrator.recalibration import Recalibrated, Recalibration
from orchestrator.sources import CalibrationFiles, InputFile
from orchestrator.spec import validate_strictly
from orchestrator.work import Work

if TYPE_CHECKING:
    from orchestrator.plan import Step

SOURCE_FIELD = "source"  # of a calibrator: what a recalibration replaces


@dataclass(frozen=True)
class VariantPlan:
    """The steps of a variant's chain, in their order; indices are those of the plan.

    key: see `orchestrator.recalibration.Variant`.
    """

    asked: Recalibration
    key: str
    steps: tuple[Step, ...]


def check_recalibrations(drafts: Sequence[Draft], digests: FileDigests, note: Note) -> None:
    """Settle what evaluators ask to be calibrated otherwise, or note why that cannot be."""
    for at, draft in enumerate(drafts):
        if not isinstance(draft.method, Evaluator):
            continue
        try:
            with plugin_fault(draft.installed, "recalibrations"):
                asked = tuple(draft.method.recalibrations())
            if asked:
                _check_texts(draft, note)
                draft.recalibrated = _recalibrated(draft, asked, drafts[:at], digests, note)
        except PluginFaultError as error:
            note(error, draft.place)


def _check_texts(draft: Draft, note: Note) -> None:
    """Refuse a text that is named twice, and one that the same step measures on."""
    seen: dict[str, str] = {}  # sha256 -> field
    calibrating = set(marked_fields(type(draft.method), CalibrationFiles))
    for field in (*sorted(set(marked_fields(type(draft.method), InputFile)) - calibrating), *sorted(calibrating)):
        for name, sha256 in _digests(field, draft.parameters[field]):
            if sha256 in seen and field in calibrating:
                measured = seen[sha256].partition(".")[0] not in calibrating
                note(
                    SpecError(
                        f"this is the text of `{seen[sha256]}`"
                        + (", so what is measured on it is not held out" if measured else ", under another name"),
                        remedy="name another text",
                    ),
                    (*draft.location, "with", *name.split(".")),
                )
            seen.setdefault(sha256, name)


def _digests(field: str, value: Any) -> list[tuple[str, str]]:
    """(field, or field.name of a mapping, sha256) of the texts that a parameter names."""
    if not value:
        return []
    if isinstance(value.get("sha256"), str):
        return [(field, value["sha256"])]
    return [(f"{field}.{name}", part["sha256"]) for name, part in value.items()]


def _recalibrated(
    draft: Draft, asked: Sequence[Recalibration], before: Sequence[Draft], digests: FileDigests, note: Note
) -> tuple[Recalibrated, ...]:
    """The calibrate steps before, on the other texts; () if that was refused."""
    calibrated: list[int] = []
    matters = False
    for index, earlier in enumerate(before):
        method = earlier.method
        if isinstance(method, Calibrator):
            calibrated.append(index)
        reads = isinstance(method, ModelMethod) or (
            isinstance(method, LayerMethod) and method.needs is not Needs.WEIGHT
        )
        matters = matters or (bool(calibrated) and reads)
    if not matters:
        lacking = "no step before it changes the model by what it was calibrated on"
        note(
            SpecError(
                f"{draft.label} makes the model again on other calibration texts, and {lacking}",
                remedy="put it behind a calibrate step and a method that reads the calibration set, or remove it",
            ),
            draft.place,
        )
        return ()
    found: dict[str, dict[int, tuple[Method, Mapping[str, Any]]]] = {}  # by source
    refused = False
    for one in asked:
        if one.source in found:
            continue
        found[one.source] = {}
        for index in calibrated:
            try:
                found[one.source][index] = _on_another_text(before[index], one.source, digests)
            except OrchestratorError as error:
                note(error, (*draft.location, "with", *one.field.split(".")))
                refused = True
    return () if refused else tuple(Recalibrated(one, found[one.source]) for one in asked)


def _on_another_text(draft: Draft, source: str, digests: FileDigests) -> tuple[Method, Mapping[str, Any]]:
    """A calibrate step's method with another text, checked like the first, and its parameters."""
    if SOURCE_FIELD not in marked_fields(type(draft.method), InputFile):
        raise SpecError(
            f"{draft.label} takes no text called `{SOURCE_FIELD}`, so it cannot be given another",
            remedy="calibrate by a method that does, for instance calibrate text",
        )
    values = draft.method.model_dump() | {SOURCE_FIELD: source}
    with plugin_fault(draft.installed, "preflight"):
        try:
            method = validate_strictly(type(draft.method), values)
        except ValidationError as error:
            raise SpecError(f"{draft.label} does not take this text: {error.errors()[0]['msg']}") from None
        method.preflight()
    return method, parameters_of(draft.installed, method, digests)


def variant_plans(draft: Draft, steps: Sequence[Step], model: int) -> tuple[VariantPlan, ...]:
    """Return the chains that lead to step `model`, recalibrated as the draft of an evaluator asks.

    steps: those of the plan before the evaluator.
    """
    chain: set[int] = set()
    pending = [model] if draft.recalibrated else []
    while pending:
        index = pending.pop()
        if index >= 0 and index not in chain:
            chain.add(index)
            pending += steps[index].inputs.values()
    plans = []
    for recalibrated in draft.recalibrated:
        made: dict[int, Step] = {}
        for index in sorted(chain):
            made[index] = _changed(steps[index], made, recalibrated)
        facts = {"model": made[model].fingerprint, "evaluator": draft.installed.source_digest}
        plans.append(VariantPlan(recalibrated.asked, digest_of(facts), tuple(made.values())))
    return tuple(plans)


def _changed(step: Step, made: Mapping[int, Step], recalibrated: Recalibrated) -> Step:
    """A step of the plan as a step of the variant: its own inputs, seed and text, and the fingerprint of that."""
    method, parameters = recalibrated.calibrators.get(step.index, (step.method, step.identity["parameters"]))
    inputs = {
        role: made[at].fingerprint if at in made else step.identity["inputs"][role] for role, at in step.inputs.items()
    }
    identity = {**step.identity, "parameters": parameters, "inputs": inputs}
    if "seed" in identity:
        identity["seed"] = recalibrated.asked.seed
    return replace(step, method=method, identity=identity, fingerprint=digest_of(identity), require={})


def models_to_make(step: Step, planned: Sequence[Step]) -> list[VariantPlan]:
    """The variants of a validate step whose models are not those of the plan itself."""
    own = {other.fingerprint for other in planned}
    return [variant for variant in step.variants if variant.steps[-1].fingerprint not in own]


def variant_work(step: Step, planned: Sequence[Step], works: Sequence[Work]) -> Work:
    """What making the variants takes, beside measuring them. works: of the plan's steps before, by index."""
    own = {other.fingerprint for other in planned}
    whole = Work()
    for variant in models_to_make(step, planned):
        for made in variant.steps:
            if made.fingerprint not in own:
                work = works[made.index]
                scratch = work.scratch_bytes + 2 * work.disk_bytes  # what the step reads lies beside what it writes
                whole = whole.then(replace(work, disk_bytes=0, scratch_bytes=0))
                whole = replace(whole, scratch_bytes=max(whole.scratch_bytes, scratch))
    return whole
