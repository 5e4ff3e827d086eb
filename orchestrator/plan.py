"""From a specification and the installed methods to a plan: frozen steps, each with a fingerprint.

Everything a user can get wrong is found here, all at once, before any compute is spent. Imports no torch.

A fingerprint is sha256 over canonical JSON of everything that decides a step's result: method and parameters (text
sources by content), the plugin's and the core's sources, the libraries that compute, the seed where it is used, and
the fingerprints of the steps that it reads (the bytes of the source model, for the first). So all fingerprints of a
plan are known before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cache_policy import CachePolicy
from orchestrator.canonical import digest_of
from orchestrator.checkpoint import Checkpoint, locate_model
from orchestrator.checks import (
    Draft,
    Note,
    PluginFaultError,
    check_against_model,
    check_chain,
    check_source_model,
    plugin_fault,
)
from orchestrator.digests import FileDigests
from orchestrator.errors import OrchestratorError, PreflightError, Problem, SpecError
from orchestrator.export_format import ExportFormat
from orchestrator.foreseen import Foresight
from orchestrator.formats import chosen_policy, format_identity, listed_methods
from orchestrator.gate_checks import check_gated, gates_of
from orchestrator.layer_method import InputMode, LayerMethod, Needs
from orchestrator.method import Calibrator, Evaluator, Method, ModelMethod, Publisher, Stage
from orchestrator.parameters import parameterize, parameters_of
from orchestrator.plugins import InstalledMethod, Methods, library_versions, package_digest
from orchestrator.release_checks import check_listed
from orchestrator.remote_code import recorded_code
from orchestrator.serving_engine import ServingEngine
from orchestrator.spec import Location, ModelSpec, SpecFile, SpecText, StepSpec, read_spec
from orchestrator.variants import VariantPlan, check_recalibrations, variant_plans

SOURCE = -1  # stands for the source model where an input is the index of a step
_SHOWING = (
    "catalogue.py",
    "cli.py",
    "cli_output.py",
    "cli_report.py",
    "cli_serving.py",
    "conformance",
    "html_report",
    "interrupts.py",
    "lookup.py",
    "planned.py",
    "progress.py",
    "quickstart",
    "gates.py",
    "report.py",
    "simulation",
    "testing.py",
    "usage.py",
    "zeros.py",
)
_FORESEEING = ("estimate.py", "facts.py", "foreseen.py", "machine.py", "preflight.py", "work.py")
NOT_COMPUTING = (*_SHOWING, *_FORESEEING)  # files of the core that decide no result
# Methods that no step is, but that a step of their stage lists.
LISTED: tuple[tuple[type[Method], str, str], ...] = (
    (ServingEngine, "a serving engine", "engines"),
    (ExportFormat, "a file format", "formats"),
    (CachePolicy, "a cache policy", "policy"),
)


@dataclass(frozen=True)
class Step:
    """A method with its parameters at a place in a plan.

    calibrated_on: what a layer method's blocks see; None where it sees none. device: "cpu" or "cuda".
    inputs: role ("model", "dense", "calibration") -> index of the step that gives it, or `SOURCE`.
    reads, gives: the model before and after the step, as far as it is foreseen: configuration and dense shapes.
    variants: other calibrations of the chain before, which an evaluator asks for.
    identity: everything that went into the fingerprint.
    """

    index: int
    place: str
    method: Method
    skip: tuple[str, ...]
    calibrated_on: InputMode | None
    device: str
    require: Mapping[str, Mapping[str, float]]
    must_not_fall: tuple[str, ...]
    engines: tuple[ServingEngine, ...]
    formats: tuple[ExportFormat, ...]
    policy: CachePolicy | None
    inputs: Mapping[str, int]
    reads: Checkpoint
    gives: Checkpoint
    identity: Mapping[str, Any]
    fingerprint: str
    variants: tuple[VariantPlan, ...] = ()

    @property
    def stage(self) -> Stage:
        """The stage of the method."""
        return self.method.stage

    @property
    def label(self) -> str:
        """The step as people write it, e.g. "prune wanda"."""
        return f"{self.stage} {self.method.name}"

    @property
    def makes_model(self) -> bool:
        """Whether the result is a model."""
        return isinstance(self.method, LayerMethod | ModelMethod)


@dataclass(frozen=True)
class Plan:
    """The steps of a pipeline, ready to run.

    max_memory_bytes: what the specification lets a layer method use beside the interpreter and its libraries.
    """

    name: str
    spec_path: Path
    seed: int
    source: Checkpoint
    source_digest: str
    steps: tuple[Step, ...]
    max_memory_bytes: int | None = None


def make_plan(
    spec_path: Path,
    methods: Methods,
    home: Path,
    *,
    tracking_uri: str | None = None,
    trust_file_times: bool = True,
    may_run_code: bool = False,
) -> Plan:
    """Resolve a specification. Raises `SpecError` or `PreflightError` with every problem found.

    home: where the artifact store is; nothing is written there but a memory of file digests.
    tracking_uri: where releases are registered; part of a register step's identity.
    trust_file_times: take the sha256 of unchanged files from that memory.
    may_run_code: let trusted code of the model run where a step's result is foreseen; see `orchestrator.foreseen`.
    """
    file = read_spec(spec_path)
    digests = FileDigests(home, trust=trust_file_times)
    problems: list[tuple[type[OrchestratorError], Problem]] = [(SpecError, fault) for fault in file.faults]

    def note(error: OrchestratorError, location: Location) -> None:
        kind = PreflightError if isinstance(error, PreflightError) else SpecError
        for problem in error.problems:
            where = problem.where if problem.where and ":" in problem.where else file.place(location)
            problems.append((kind, Problem(problem.what, where, problem.remedy)))

    drafts = []
    for index, step in file.steps.items():
        draft = _draft(file, step, ("steps", index), methods, home, digests, note)
        if draft:
            drafts.append(draft)
    source = _open_source(file, file.model, digests, note) if file.model else None
    if file.spec and len(drafts) == len(file.spec.steps):
        check_chain(drafts, note)
        check_gated(drafts, note)
        check_recalibrations(drafts, digests, note)
    reads: list[Checkpoint] = []
    if source:
        foresight = Foresight(home, may_run_code=may_run_code)
        model = source[0]
        for draft in drafts:
            _settle_dtype(draft, source[0], digests, note)
            check_against_model(draft, model, note)
            reads.append(model)
            model = foresight.after(draft, model, note)
        reads.append(model)
        foresight.save()
        engines = [found.cls for found in methods.installed.values() if issubclass(found.cls, ServingEngine)]
        check_listed(drafts, reads, engines, note)
    digests.save()
    if problems:
        kind = SpecError if any(kind is SpecError for kind, _ in problems) else PreflightError
        raise kind(sorted((problem for _, problem in problems), key=file.line_of))
    if source is None:
        raise PreflightError("the model cannot be used")
    return _fingerprinted(file.whole(), drafts, reads, *source, tracking_uri)


def _settle_dtype(draft: Draft, source: Checkpoint, digests: FileDigests, note: Note) -> None:
    """Fill in what a layer method takes from the model's dtype."""
    if not isinstance(draft.method, LayerMethod):
        return
    try:
        with plugin_fault(draft.installed, "for_dtype"):
            method = draft.method.for_dtype(source.dtype_name)
            if not isinstance(method, LayerMethod):
                raise TypeError(f"it returned {type(method).__name__}, not a LayerMethod")
        draft.method, draft.parameters = method, parameters_of(draft.installed, method, digests)
    except PluginFaultError as error:
        note(error, draft.place)
    except OrchestratorError as error:
        note(error, (*draft.location, "with"))


def _open_source(file: SpecText, model: ModelSpec, digests: FileDigests, note: Note) -> tuple[Checkpoint, str] | None:
    try:
        trusted = model.trust_remote_code
        source = locate_model(model.id, model.revision, file.folder, model.dtype, trust_remote_code=trusted)
        check_source_model(source, model.id)
        return source, source.digest(digests.sha256)
    except OrchestratorError as error:
        note(error, ("model", "id"))
    except OSError as error:
        note(PreflightError(f"{model.id} cannot be read: {error}"), ("model", "id"))
    return None


def _draft(
    file: SpecText,
    step: StepSpec,
    location: Location,
    methods: Methods,
    home: Path,
    digests: FileDigests,
    note: Note,
) -> Draft | None:
    """Find the method and validate its parameters; None if that failed (and was noted)."""
    here = (*location, step.stage.value)
    try:
        installed = methods.find(step.stage, step.method)
        for listed, what, key in LISTED:
            if issubclass(installed.cls, listed):
                remedy = f"list it under `{key}:` of a {step.stage} step"
                raise SpecError(f'"{step.method}" is {what}', remedy=remedy)
    except SpecError as error:
        note(error, here)
        return None
    method = parameterize(file, installed, step.with_, (*location, "with"), home, note)

    def built(found: InstalledMethod, values: Mapping[str, Any], place: Location) -> Method | None:
        return parameterize(file, found, values, place, home, note)

    engines = listed_methods(step.engines, (*location, "engines"), ServingEngine, methods, built, note)
    formats = listed_methods(step.formats, (*location, "formats"), ExportFormat, methods, built, note)
    policy = chosen_policy(step.policy, (*location, "policy"), methods, built, note)
    complete = method is not None and len(engines) == len(step.engines) and len(formats) == len(step.formats)
    complete = complete and (policy is None) == (step.policy is None)
    calibrated = issubclass(installed.cls, LayerMethod) and installed.cls.needs is not Needs.WEIGHT
    if step.inputs and not calibrated:
        note(
            SpecError(f"`inputs` means nothing to {step.stage} {step.method}", remedy="remove it"),
            (*location, "inputs"),
        )
    for key, kind, given in (
        ("skip", LayerMethod, step.skip),
        ("require", Evaluator | Publisher, step.require),
        ("must_not_fall", Evaluator, step.must_not_fall),
        ("engines", Publisher, step.engines),
        ("formats", Publisher, step.formats),
    ):
        if given and not issubclass(installed.cls, kind):
            note(
                SpecError(f"`{key}` means nothing to {step.stage} {step.method}", remedy="remove it"), (*location, key)
            )
    if step.policy and not (issubclass(installed.cls, Evaluator) and installed.cls.takes_policy):
        note(
            SpecError(f"`policy` means nothing to {step.stage} {step.method}", remedy="remove it"),
            (*location, "policy"),
        )
    gates = gates_of(step, location, installed, method, note)
    try:
        if method is None or not complete:
            return None
        with plugin_fault(installed, "preflight"):
            method.preflight()
        parameters = parameters_of(installed, method, digests)
    except PluginFaultError as error:
        note(error, here)
        return None
    except OrchestratorError as error:
        note(error, (*location, "with"))
        return None
    return Draft(step, location, installed, method, engines, parameters, formats, policy, gates)


def _fingerprinted(
    file: SpecFile,
    drafts: Sequence[Draft],
    reads: Sequence[Checkpoint],
    source: Checkpoint,
    source_digest: str,
    tracking_uri: str | None,
) -> Plan:
    spec = file.spec
    steps: list[Step] = []
    model, calibration = SOURCE, None
    core = package_digest("orchestrator", NOT_COMPUTING)

    def reference(index: int) -> str:
        if index == SOURCE:
            return digest_of({"model": source_digest, "dtype": source.dtype})
        return steps[index].fingerprint

    for index, draft in enumerate(drafts):
        method = draft.method
        inputs = {"model": SOURCE if isinstance(method, Calibrator) else model}
        if isinstance(method, ModelMethod | Evaluator):
            inputs["dense"] = SOURCE
        reads_calibration = (
            isinstance(method, ModelMethod)
            or (isinstance(method, LayerMethod) and method.needs is not Needs.WEIGHT)
            or bool(draft.formats)
            or (isinstance(method, Evaluator) and method.reads_calibration())
        )
        if reads_calibration and calibration is not None:
            inputs["calibration"] = calibration
        identity: dict[str, Any] = {
            "kind": draft.installed.kind,
            "stage": method.stage.value,
            "method": method.name,
            "parameters": draft.parameters,
            "plugin": draft.installed.identity,
            "core": core,
            "environment": library_versions(),
            "inputs": {role: reference(at) for role, at in inputs.items()},
            **recorded_code(source.code),
        }
        if not isinstance(method, LayerMethod | Publisher):
            identity["seed"] = spec.seed
        if isinstance(method, LayerMethod):
            identity |= {"skip": sorted(draft.spec.skip), "device": spec.device}
            if method.needs is not Needs.WEIGHT:
                identity["calibrated_on"] = draft.spec.inputs or method.inputs
        if isinstance(method, Publisher):
            identity |= {
                "name": spec.name,
                "registry": tracking_uri,
                "engines": [
                    {
                        "name": engine.name,
                        "parameters": engine.model_dump(mode="json"),
                        "plugin": found.identity,
                    }
                    for found, engine in draft.engines
                ],
            }
        if draft.policy:
            found, policy = draft.policy
            identity["policy"] = {
                "name": policy.name,
                "parameters": policy.model_dump(mode="json"),
                "plugin": found.identity,
            }
        if draft.formats:
            identity |= {
                "seed": spec.seed,
                "formats": [format_identity(export) | {"plugin": found.identity} for found, export in draft.formats],
            }
        variants = variant_plans(draft, steps, model)
        if variants:
            identity["variants"] = {variant.asked.name: variant.steps[-1].fingerprint for variant in variants}
        steps.append(
            Step(
                index=index,
                place=file.place((*draft.location, draft.spec.stage.value)),
                method=method,
                skip=draft.spec.skip,
                calibrated_on=identity.get("calibrated_on"),
                device=spec.device,
                require=draft.gates.require,
                must_not_fall=draft.gates.must_not_fall,
                engines=tuple(engine for _, engine in draft.engines),
                formats=tuple(export for _, export in draft.formats),
                policy=draft.policy[1] if draft.policy else None,
                inputs=inputs,
                reads=reads[index],
                gives=reads[index + 1],
                identity=identity,
                fingerprint=digest_of(identity),
                variants=variants,
            )
        )
        if isinstance(method, Calibrator):
            calibration = index
        elif steps[-1].makes_model:
            model = index
    limit = None if spec.max_memory_gib is None else int(spec.max_memory_gib * 2**30)
    return Plan(spec.name, file.path, spec.seed, source, source_digest, tuple(steps), limit)
