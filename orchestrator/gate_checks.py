"""What planning asks of gates: that somebody measures what they bound, that they do not rest on KL alone, and that what
they are measured on is not what the model was calibrated or trained on. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from orchestrator.bootstrap import CONFIDENCE, FEWEST_UNITS, RESAMPLES
from orchestrator.checks import Draft, Gates, Note, PluginFaultError, plugin_fault
from orchestrator.deployment import KV_METRICS
from orchestrator.errors import SpecError
from orchestrator.gates import base_of, dense_of, ratio_of
from orchestrator.layer_method import LayerMethod
from orchestrator.method import Evaluator, Method, ModelMethod, Publisher
from orchestrator.parameters import marked_fields
from orchestrator.plugins import InstalledMethod
from orchestrator.sign_test import fewest_noticed
from orchestrator.sources import CalibrationFiles, HeldOutFiles, InputFile
from orchestrator.spec import Bound, Location, StepSpec

if TYPE_CHECKING:
    from orchestrator.plan import Step

KL = "kl_"
LEAST_CONFIDENCE = 0.5  # below, somebody means 1 - confidence
MOST_CONFIDENCE = 0.998  # of 10,000 resamples, ten are beyond each end


def gates_of(
    step: StepSpec, location: Location, installed: InstalledMethod, method: Method | None, note: Note
) -> Gates:
    """Resolve the bounds of a step, noting those that nothing of what it measures can be held against.

    A name may hold ``*``: then every metric that it matches has the bound. method: None if its parameters are wrong.
    """
    if not step.require and not step.must_not_fall:
        return Gates({})
    try:
        declared = _declared(step, installed, method)
    except PluginFaultError as error:
        note(error, (*location, step.stage.value))
        return Gates({})
    if declared is None:
        return Gates({})
    require: dict[str, Mapping[str, float]] = {}
    for pattern, bound in step.require.items():
        place = (*location, "require", pattern)
        if method is None and pattern not in declared and ("." in pattern or "*" in pattern):
            continue  # whether it is measured depends on parameters, and those are wrong
        for name in _matching(pattern, declared, step.method, place, note):
            fault = _unheld(installed.cls, name, bound, declared) or _unsure(method, bound.confidence)
            if fault:
                note(fault, place)
            given = bound.model_dump(exclude_none=True)
            if name in require:
                given = _stricter(require[name], given)
                fault = None if fault else _together(installed.cls, name, given, declared)
                if fault:
                    note(fault, place)
            require[name] = given
    fallen: list[str] = []
    for index, pattern in enumerate(step.must_not_fall if method else ()):
        place = (*location, "must_not_fall", index)
        for name in _matching(pattern, declared, step.method, place, note):
            fault = _no_twin(installed.cls, name, declared) or _no_interval(installed.cls, (name, dense_of(name)))
            fault = fault or _unsure(method, CONFIDENCE)
            if fault:
                note(fault, place)
            fallen.append(name)
    return Gates(require, tuple(dict.fromkeys(fallen)))


def _declared(step: StepSpec, installed: InstalledMethod, method: Method | None) -> set[str] | None:
    """The metrics that the step measures, without tiers if its parameters are wrong; None if it measures nothing."""
    if issubclass(installed.cls, Publisher):
        return {f"{name}.{engine}" for name in KV_METRICS for entry in step.engines for engine in entry}
    if isinstance(method, Evaluator):
        with plugin_fault(installed, "declared"):
            return set(method.declared())
    return set(installed.cls.metrics) if issubclass(installed.cls, Evaluator) else None


def _matching(pattern: str, declared: set[str], method: str, place: Location, note: Note) -> list[str]:
    found = [pattern] if pattern in declared else []
    if "*" in pattern:
        found = sorted(name for name in declared if fnmatchcase(name, pattern))
    if not found:
        known = ", ".join(sorted(declared)) or "nothing"
        note(SpecError(f"{method} measures no {pattern!r}", remedy=f"it measures {known}"), place)
    return found


def _unheld(cls: type[Method], name: str, bound: Bound, declared: set[str]) -> SpecError | None:
    """Why the metric cannot be held against the bound, or None."""
    if bound.retain is not None:
        fault = _no_twin(cls, name, declared)
        if fault or bound.confidence is None:
            return fault
        return _no_interval(cls, (ratio_of(name), *(() if bound.min is bound.max is None else (name,))))
    return None if bound.confidence is None else _no_interval(cls, (name,))


def _stricter(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Two bounds on the same metric as one that holds both: a later one loosens nothing."""
    pick = {"max": min, "min": max, "retain": max, "confidence": max}
    return {
        key: pick[key](bound[key] for bound in (one, other) if key in bound)
        for key in (*one, *(key for key in other if key not in one))
    }


def _together(cls: type[Method], name: str, given: Mapping[str, float], declared: set[str]) -> SpecError | None:
    """Why two bounds, each of which can be held, cannot both be."""
    if given.get("min", -math.inf) > given.get("max", math.inf):
        return SpecError(
            f"together with another bound, {name} has min {given['min']:g} above max {given['max']:g}",
            remedy="bounds on the same metric all hold, those of a pattern too; correct one",
        )
    return _unheld(cls, name, Bound.model_validate(given), declared)


def _unsure(method: Method | None, confidence: float | None) -> SpecError | None:
    """Why an interval of this confidence could not be had, or would say nothing."""
    if confidence is None:
        return None
    if not LEAST_CONFIDENCE <= confidence <= MOST_CONFIDENCE:
        remedy = f"give {LEAST_CONFIDENCE} to {MOST_CONFIDENCE}, for instance 0.95 for an interval of 95 %"
        return SpecError(f"a confidence of {confidence} cannot be had from {RESAMPLES:,} resamples", remedy=remedy)
    units = method.most_units() if isinstance(method, Evaluator) else None
    if units is not None and units < FEWEST_UNITS:
        return SpecError(
            f"an interval takes {FEWEST_UNITS} units, and this step measures {units}",
            remedy="measure more (`windows`), or leave out `confidence` and `must_not_fall`",
        )
    return None


def _no_twin(cls: type[Method], name: str, declared: set[str]) -> SpecError | None:
    better = cls.better if issubclass(cls, Evaluator) else {}
    if base_of(name) in better and dense_of(name) in declared and ratio_of(name) in declared:
        return None
    can = sorted(
        other for other in declared if base_of(other) in better and {dense_of(other), ratio_of(other)} <= declared
    )
    return SpecError(
        f"{name} cannot be compared with the dense model's",
        remedy=f"metrics that can: {', '.join(can) or 'none of this step'}; give the others min or max",
    )


def _no_interval(cls: type[Method], names: Sequence[str]) -> SpecError | None:
    sampled = cls.sampled if issubclass(cls, Evaluator) else frozenset()
    lacking = [name for name in names if base_of(name) not in sampled]
    if not lacking:
        return None
    return SpecError(
        f"there is no interval of {', '.join(lacking)}",
        remedy=f"leave out `confidence`; metrics with one: {', '.join(sorted(sampled)) or 'none of this step'}",
    )


def check_gated(drafts: Sequence[Draft], note: Note) -> None:
    """Refuse a registration whose only gates on quality are on KL divergences, and texts that are not held out."""
    gates: dict[str, Draft] = {}  # on the model as it is at this point
    seen: dict[str, tuple[Draft, str]] = {}  # sha256 of texts -> what reads it to change or measure the model
    for draft in drafts:
        method = draft.method
        if isinstance(method, LayerMethod | ModelMethod):
            gates = {}
        if isinstance(method, Evaluator):
            gates |= dict.fromkeys((*draft.gates.require, *draft.gates.must_not_fall), draft)
        else:
            for name, sha256 in _texts(draft, InputFile):
                seen.setdefault(sha256, (draft, name))
        if isinstance(method, Publisher):
            kl = sorted(name for name in gates if base_of(name).startswith(KL))
            if kl and not any(_of_quality(name, owner) for name, owner in gates.items()):
                note(
                    SpecError(
                        f"{method.stage} {method.name} would rest on {', '.join(kl)} alone, and a small divergence "
                        "does not show that the model still does its work",
                        remedy="gate on perplexity, accuracy or top1_agreement too",
                    ),
                    draft.place,
                )
    for draft in drafts:
        if isinstance(draft.method, Evaluator):
            _check_held_out(draft, seen, note)


def _check_held_out(draft: Draft, seen: Mapping[str, tuple[Draft, str]], note: Note) -> None:
    """Refuse a text that was calibrated or trained on where bounds rest on it, and one under two names."""
    named: dict[str, str] = {}
    for name, sha256 in _texts(draft, HeldOutFiles):
        if sha256 in named:
            note(
                SpecError(
                    f"this is the text of `{named[sha256]}`, under another name",
                    remedy="name another text, or leave it out",
                ),
                (*draft.location, "with", *name.split(".")),
            )
        named.setdefault(sha256, name)
    held_out = {field.partition(".")[0] for field in named.values()}
    resting = bool(draft.gates.require or draft.gates.must_not_fall)
    others = set(marked_fields(type(draft.method), CalibrationFiles)) | held_out
    for name, sha256 in _texts(draft, InputFile) if resting else ():
        if name.partition(".")[0] not in others:
            named.setdefault(sha256, name)
    for sha256, name in named.items():
        if sha256 in seen:
            owner, field = seen[sha256]
            note(
                SpecError(
                    f"this is the text of `{field}` of {owner.label}, so it is not held out",
                    remedy="name a text that no step calibrates or trains on",
                ),
                (*draft.location, "with", *name.split(".")),
            )


def unnoticed(step: Step) -> list[str]:
    """How little `must_not_fall` cannot tell from chance, as sentences for the plan."""
    method = step.method
    if not isinstance(method, Evaluator):
        return []
    names = [name for name in step.must_not_fall if base_of(name) in method.right_or_wrong]
    if not names:
        return []
    units, noticed = method.most_units(), fewest_noticed(CONFIDENCE)
    of = f" of at most {units}" if units else ""
    return [
        f"must_not_fall {', '.join(names)}: fewer than {noticed}{of} lost, with none won, cannot be told from chance"
    ]


def _of_quality(name: str, owner: Draft) -> bool:
    """Whether a gate says how good the model is, other than by KL; of a plugin that grades no metric, any may.

    A bound on the better side of a metric says nothing, nor does a smallest value that every model has.
    """
    method = owner.method
    if not isinstance(method, Evaluator) or not method.quality:
        return False
    base = base_of(name).removesuffix("_ratio")
    if base.startswith(KL) or (method.better and base not in method.better):
        return False
    bound = owner.gates.require.get(name, {})
    if not method.better or name in owner.gates.must_not_fall or "retain" in bound:
        return True
    return "max" in bound if method.better[base] == "lower" else bound.get("min", 0.0) > 0


def _texts(draft: Draft, mark: type) -> Iterator[tuple[str, str]]:
    """(field, or field.name of a mapping, sha256) of the texts that a step reads."""
    for field in marked_fields(type(draft.method), mark):
        value = draft.parameters[field] or {}
        named = {field: value} if "sha256" in value and isinstance(value["sha256"], str) else {}
        named = named or {f"{field}.{name}": part for name, part in value.items()}
        yield from ((name, part["sha256"]) for name, part in named.items())
