"""What planning refuses: chains that lose an invariant, layers a method cannot handle, engines that cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError, PreflightError, SpecError
from orchestrator.layers import is_skipped, split_fused_groups
from orchestrator.method import Calibrator, Invariant, LayerMethod, Method, ModelMethod, Needs, ServingEngine
from orchestrator.packing import check_scheme
from orchestrator.plugins import InstalledMethod
from orchestrator.serving import ModelShape, plan_kv
from orchestrator.spec import Location, StepSpec

OUTPUT_HEAD = "lm_head"  # never compressed, so naming it in `skip` is right, if needless
Note = Callable[[OrchestratorError, Location], None]


@dataclass
class Draft:
    """What planning knows about a step before its fingerprint."""

    spec: StepSpec
    location: Location
    installed: InstalledMethod
    method: Method
    engines: list[tuple[InstalledMethod, ServingEngine]]
    parameters: dict[str, Any]


def check_chain(drafts: Sequence[Draft], note: Note) -> None:
    """Refuse a chain in which a step lacks what it needs, or loses what an earlier one established."""
    held: dict[Invariant, Draft] = {}
    calibrated = False
    for draft in drafts:
        method, here = draft.method, (*draft.location, draft.spec.stage.value)
        if isinstance(method, Calibrator):
            calibrated = True
        wants = (isinstance(method, LayerMethod) and method.needs is not Needs.WEIGHT) or (
            isinstance(method, ModelMethod) and method.needs_calibration()
        )
        if wants and not calibrated:
            note(
                SpecError(
                    f"{method.stage} {method.name} needs a calibration set", remedy="put a calibrate step before"
                ),
                here,
            )
        if isinstance(method, LayerMethod | ModelMethod):
            for invariant, owner in held.items():
                if invariant not in method.keeps:
                    first = f"{owner.method.stage} {owner.method.name}"
                    this = f"{method.stage} {method.name}"
                    note(
                        SpecError(
                            f"{this} would destroy the {invariant} that {first} established",
                            remedy=f"put {this} before {first}, or use a method that keeps {invariant}",
                        ),
                        here,
                    )
            held.update(dict.fromkeys(method.provides, draft))


def check_against_model(draft: Draft, source: Checkpoint, note: Note) -> None:
    """Check what depends on the model's shapes: layers, skip patterns, the engines' context length."""
    method = draft.method
    try:
        if isinstance(method, LayerMethod):
            _check_layers(draft, method, source, note)
        for index, (_, engine) in enumerate(draft.engines):
            location = (*draft.location, "engines", index, engine.name)
            try:
                shape = ModelShape.from_config(source.config)
                # Weights that take no room at all: what is refused here no compression can make fit.
                plan = plan_kv(shape, weight_bytes=0, **engine.budget())
                engine.render(shape, plan)
            except OrchestratorError as error:
                note(error, location)
    except PreflightError as error:
        note(error, ("model", "id"))


def _check_layers(draft: Draft, method: LayerMethod, source: Checkpoint, note: Note) -> None:
    layers = source.block_layers()
    if not layers:
        note(
            PreflightError(
                f"no linear layers found inside decoder blocks of a {source.config['model_type']!r} model",
                remedy="this version walks Llama-, Qwen- and Mistral-like models",
            ),
            ("model", "id"),
        )
        return
    names = [layer.name for layer in layers]
    for index, pattern in enumerate(draft.spec.skip):
        if pattern != OUTPUT_HEAD and not any(is_skipped(name, (pattern,)) for name in names):
            note(
                SpecError(f"{pattern!r} matches no layer", remedy=f"names look like {names[0]}"),
                (*draft.location, "skip", index),
            )
    remaining = [layer for layer in layers if not is_skipped(layer.name, draft.spec.skip)]
    if not remaining:
        note(SpecError("every layer is skipped", remedy="skip fewer"), (*draft.location, "skip"))
    scheme = method.scheme()
    if scheme:
        for problem in split_fused_groups(names, draft.spec.skip):
            note(SpecError(problem), (*draft.location, "skip"))
        unsupported = check_scheme(scheme)
        if unsupported:
            note(SpecError(unsupported), (*draft.location, "with"))
    refused: dict[tuple[str, str], list[str]] = {}
    for layer in remaining:
        fault = method.check_layer(layer)
        if fault:
            refused.setdefault(fault, []).append(layer.name)
    for (parameter, what), where in refused.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        note(SpecError(f"{what} of {where[0]}{more}"), (*draft.location, "with", parameter))
