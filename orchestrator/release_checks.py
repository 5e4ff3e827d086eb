"""What planning asks of the formats and engines of a register step: whether they can carry the model to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from orchestrator.attention import ModelShape
from orchestrator.checkpoint import Checkpoint
from orchestrator.checks import Draft, Note, PluginFaultError, plugin_fault, possible_schemes
from orchestrator.deployment import check_engine
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.export_format import ExportFacts, ExportFormat
from orchestrator.formats import FOLDER
from orchestrator.layer_method import LayerMethod
from orchestrator.layers import is_skipped
from orchestrator.method import Invariant, ModelMethod
from orchestrator.plugins import InstalledMethod
from orchestrator.scheme import QuantScheme
from orchestrator.serving_engine import ServingEngine


def check_listed(
    drafts: Sequence[Draft], reads: Sequence[Checkpoint], engines: Sequence[type[ServingEngine]], note: Note
) -> None:
    """Ask every format and engine whether it can do here what it was listed for.

    reads: by step, the model that it reads, as foreseen. engines: those that are installed, to name one that can do
    what another cannot.
    """
    for draft, facts in zip(drafts, _facts(drafts, reads), strict=False):
        for index, (installed, export) in enumerate(draft.formats):
            try:
                _check_code(facts.model, export.name)
                _check_format(installed, export, facts)
            except PluginFaultError as error:
                note(error, draft.place)
            except OrchestratorError as error:
                note(error, (*draft.location, FOLDER, index, export.name))
        written = {export.name for _, export in draft.formats}
        for index, (installed, engine) in enumerate(draft.engines):
            try:
                _check_code(facts.model, engine.name)
                _check_engine(installed, engine, facts, written, engines)
            except OrchestratorError as error:
                note(error, (*draft.location, "engines", index, engine.name))


def _facts(drafts: Sequence[Draft], reads: Sequence[Checkpoint]) -> Iterator[ExportFacts]:
    """By step, what the steps up to it will have made of the model; ends where that cannot be said."""
    held: set[Invariant] = set()
    schemes: dict[str, tuple[QuantScheme, ...]] = {}
    for draft, model in zip(drafts, reads, strict=False):
        method = draft.method
        if isinstance(method, LayerMethod | ModelMethod):
            held |= method.provides
        if isinstance(method, LayerMethod):
            try:
                found = tuple(possible_schemes(draft, method))
            except OrchestratorError:
                return  # noted where the step's layers are checked
            layers = [layer.name for layer in model.block_layers()]
            schemes |= {name: found for name in layers if found and not is_skipped(name, draft.spec.skip)}
        yield ExportFacts(model, frozenset(held), dict(schemes))


def _check_code(model: Checkpoint, name: str) -> None:
    if model.code:
        raise SpecError(
            f"{name} does not run code that comes with a model ({', '.join(sorted(model.code.files))})",
            remedy="leave it out: the release can be loaded with Transformers",
        )


def _check_format(installed: InstalledMethod, export: ExportFormat, facts: ExportFacts) -> None:
    with plugin_fault(installed, "preflight"):
        export.preflight()
    with plugin_fault(installed, "check"):
        export.check(facts)


def _check_engine(
    installed: InstalledMethod,
    engine: ServingEngine,
    facts: ExportFacts,
    written: set[str],
    engines: Sequence[type[ServingEngine]],
) -> None:
    with plugin_fault(installed, "preflight"):
        check_engine(engine, engines)
    if engine.needs_format and engine.needs_format not in written:
        raise SpecError(
            f"{engine.name} loads the model from formats/{engine.needs_format}, which this step does not write",
            remedy=f"add `formats: [{{{engine.needs_format}: {{}}}}]` to the step",
        )
    shape = ModelShape.from_config(facts.model.config)
    if all(len(options) == 1 for options in facts.schemes.values()):  # else what is chosen is not known yet
        schemes = tuple(dict.fromkeys(options[0] for options in facts.schemes.values()))
        shape = replace(shape, quantization=schemes, kv_scales=Invariant.KV_SCALES in facts.held)
    # Weights that take no room at all: what is refused here no compression can make fit.
    with plugin_fault(installed, "render"):
        engine.render(shape, engine.plan(shape, 0))
