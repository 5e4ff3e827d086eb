"""What planning refuses: chains that lose an invariant, layers a method cannot handle, engines that cannot serve."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.allocation import planned_schemes
from orchestrator.cache_policy import CachePolicy
from orchestrator.checkpoint import Checkpoint, TensorInfo
from orchestrator.errors import OrchestratorError, PreflightError, Problem, SpecError
from orchestrator.export_format import ExportFormat
from orchestrator.kv_scales import has_kv_scales
from orchestrator.layer_method import LayerMethod, MixedMethod, Needs
from orchestrator.layers import is_skipped, several_schemes, split_fused_groups, unquantizable, unsupported
from orchestrator.method import (
    PROVIDED_BY_STAGE,
    Calibrator,
    Evaluator,
    Invariant,
    Method,
    ModelMethod,
    Publisher,
    Stage,
)
from orchestrator.packing import check_scheme
from orchestrator.plugins import InstalledMethod
from orchestrator.scheme import QuantScheme
from orchestrator.serving_engine import ServingEngine
from orchestrator.spec import Location, StepSpec

if TYPE_CHECKING:
    from orchestrator.recalibration import Recalibrated

OUTPUT_HEAD = "lm_head"  # never compressed, so naming it in `skip` is right, if needless
# Sizes in config.json that are counts wherever they are given.
COUNTS = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # of weights that can be compressed
_DONE = {Stage.QUANTIZE: "quantized", Stage.PRUNE: "pruned", Stage.DISTILL: "distilled"}
_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
Note = Callable[[OrchestratorError, Location], None]


@dataclass(frozen=True)
class Gates:
    """The bounds of a step, patterns written out: by metric, the bounds that are given."""

    require: Mapping[str, Mapping[str, float]]
    must_not_fall: tuple[str, ...] = ()


@dataclass
class Draft:
    """What planning knows about a step before its fingerprint."""

    spec: StepSpec
    location: Location
    installed: InstalledMethod
    method: Method
    engines: list[tuple[InstalledMethod, ServingEngine]]
    parameters: dict[str, Any]
    formats: list[tuple[InstalledMethod, ExportFormat]] = field(default_factory=list)
    policy: tuple[InstalledMethod, CachePolicy] | None = None
    gates: Gates = field(default_factory=lambda: Gates({}))
    recalibrated: tuple[Recalibrated, ...] = ()

    @property
    def place(self) -> Location:
        """Where the specification names the method."""
        return (*self.location, self.spec.stage.value)

    @property
    def label(self) -> str:
        """The step as people write it, e.g. "prune wanda"."""
        return f"{self.method.stage} {self.method.name}"


class PluginFaultError(SpecError):
    """A method's own code failed while planning: no mistake in the parameters, so it is shown at the step."""


@contextmanager
def plugin_fault(installed: InstalledMethod, call: str) -> Iterator[None]:
    """Turn anything but an error of ours that a plugin raises into a `PluginFaultError` that names its distribution."""
    try:
        yield
    except OrchestratorError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way
        said = " ".join(str(error).split())
        raise PluginFaultError(
            f"{installed.cls.__name__}.{call} of {installed.origin} failed: {type(error).__name__}: {said}",
            remedy="tell the plugin's authors, or use another method",
        ) from error


def check_chain(drafts: Sequence[Draft], note: Note) -> None:
    """Refuse a chain in which a step lacks what it needs, or loses what an earlier one established."""
    held: dict[Invariant, Draft] = {}
    calibrated = False
    released: Draft | None = None  # the release of the model as it is at this point
    for draft in drafts:
        method, here = draft.method, draft.place
        if isinstance(method, Calibrator):
            calibrated = True
        try:
            if not calibrated and _wants_calibration(draft):
                note(SpecError(f"{draft.label} needs a calibration set", remedy="put a calibrate step before"), here)
        except PluginFaultError as error:
            note(error, here)
        if isinstance(method, Publisher):
            released = draft
        if released and isinstance(method, Evaluator) and (draft.spec.require or draft.spec.must_not_fall):
            note(
                SpecError(
                    f"the gate comes after {released.label}",
                    remedy="put it before, so that a failed gate registers nothing",
                ),
                here,
            )
        if isinstance(method, LayerMethod | ModelMethod):
            released = None
            for invariant in sorted(method.requires - held.keys()):
                givers = [stage for stage, given in PROVIDED_BY_STAGE.items() if invariant in given]
                note(
                    SpecError(
                        f"{draft.label} trains a model that has a {invariant} already, and no step before it gives one",
                        remedy=f"put a {' or '.join(givers)} step before it",
                    ),
                    here,
                )
            for invariant, owner in held.items():
                if invariant not in method.keeps:
                    note(_destroys(draft, invariant, owner), here)
            held.update(dict.fromkeys(method.provides, draft))


def _wants_calibration(draft: Draft) -> bool:
    method = draft.method
    if isinstance(method, ModelMethod):
        with plugin_fault(draft.installed, "needs_calibration"):
            return method.needs_calibration()
    return isinstance(method, LayerMethod) and method.needs is not Needs.WEIGHT


def _destroys(draft: Draft, invariant: Invariant, owner: Draft) -> SpecError:
    what = f"{draft.label} would destroy the {invariant} that {owner.label} established"
    if invariant in draft.method.provides and invariant not in owner.method.keeps:  # no order would do
        done = _DONE.get(draft.method.stage, "changed so")
        return SpecError(what, remedy=f"a model is {done} once; remove one of the two")
    remedy = f"put {draft.label} before {owner.label}, or use a method that keeps {invariant}"
    return SpecError(what, remedy=remedy)


def check_source_model(source: Checkpoint, name: str) -> None:
    """Raise `PreflightError` unless the first step can start from this model, which the specification calls `name`."""
    if source.is_quantized:
        raise PreflightError(f"{name} is already quantized", remedy="start from the dense model")
    if has_kv_scales(source.config):  # they would be stale after the first step
        raise PreflightError(
            f"{name} has scales of a KV cache already",
            remedy="start from the model without them, and measure them again with quantize kv_scales",
        )
    if not source.tensors:
        raise PreflightError(f"{name} holds no tensors")
    faults = check_config(source)
    if faults:
        remedy = "copy the model again, config.json and weights together"
        raise PreflightError([Problem(fault, remedy=remedy) for fault in faults])


def check_config(source: Checkpoint) -> list[str]:
    """Return what config.json says that cannot be, or that the stored tensors contradict. Only what is there."""
    config, tensors = source.config, source.tensors
    faults = []
    for key in COUNTS:
        value = config.get(key)
        values = value if key == "intermediate_size" and isinstance(value, list) else [value]
        if value is not None and not all(type(count) is int and count > 0 for count in values):
            faults.append(f"config.json gives {key} as {str(value)[:40]}, not as a positive whole number")
    return faults or [f"config.json gives {fault}" for fault in _contradictions(config, tensors)]


def _contradictions(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    rows_of: dict[str, int] = {}
    blocks = set()
    for name, info in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match:
            blocks.add(int(match[1]))
            if len(info.shape) == 2:
                rows_of.setdefault(match[2], info.shape[0])
    depth = config.get("num_hidden_layers")
    if blocks and depth is not None:
        extra = config.get("num_nextn_predict_layers")  # stored behind the blocks, for multi-token prediction
        allowed = {depth, depth + extra if isinstance(extra, int) else depth}
        if len(blocks) not in allowed or max(blocks) != len(blocks) - 1:
            yield f"num_hidden_layers as {depth}, but {len(blocks)} decoder blocks are stored"
    for name in ("model.embed_tokens.weight", "embed_tokens.weight"):
        if name in tensors and len(tensors[name].shape) == 2:
            for key, stored in zip(("vocab_size", "hidden_size"), tensors[name].shape, strict=True):
                if config.get(key) not in (None, stored):
                    yield f"{key} as {config[key]}, but {name} has {list(tensors[name].shape)}"
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        width = config.get("intermediate_size")
        if isinstance(width, int) and not config.get("use_double_wide_mlp") and rows_of.get(name, width) != width:
            yield f"intermediate_size as {width}, but {name} has {rows_of[name]} rows"
    heads = config.get("num_attention_heads")
    rows = rows_of.get("self_attn.q_proj.weight")
    if heads is not None and rows is not None and rows % heads:
        yield f"num_attention_heads as {heads}, but self_attn.q_proj.weight has {rows} rows"


def check_against_model(draft: Draft, model: Checkpoint, note: Note) -> None:
    """Check what depends on the shapes of the model that the step reads: layers, skip patterns."""
    method = draft.method
    try:
        if isinstance(method, LayerMethod):
            _check_layers(draft, method, model, note)
        if draft.policy:
            _check_policy(draft, *draft.policy, model, note)
        if isinstance(method, Evaluator):
            _check_evaluator(draft, method, model, note)
    except PluginFaultError as error:
        note(error, draft.place)
    except PreflightError as error:
        note(error, ("model", "id"))


def _check_policy(draft: Draft, installed: InstalledMethod, policy: CachePolicy, model: Checkpoint, note: Note) -> None:
    try:
        with plugin_fault(installed, "preflight"):
            policy.preflight()
        with plugin_fault(installed, "check_model"):
            policy.check_model(model.config)
    except PluginFaultError:
        raise
    except OrchestratorError as error:
        note(error, (*draft.location, "policy", policy.name))


def _check_evaluator(draft: Draft, method: Evaluator, model: Checkpoint, note: Note) -> None:
    try:
        with plugin_fault(draft.installed, "check_model"):
            method.check_model(model, draft.policy[1] if draft.policy else None)
    except PluginFaultError:
        raise
    except OrchestratorError as error:
        note(error, (*draft.location, "with"))


def _check_layers(draft: Draft, method: LayerMethod, source: Checkpoint, note: Note) -> None:
    fault = unsupported(source.config)
    if fault:
        note(PreflightError(fault[0], remedy=fault[1]), ("model", "id"))
        return
    layers = source.block_layers()
    names = [layer.name for layer in layers]
    if not layers:
        note(
            PreflightError(
                f"no linear layers found inside decoder blocks of a {source.config['model_type']!r} model",
                remedy="use a decoder-only model whose blocks are named layers.N, h.N or blocks.N",
            ),
            ("model", "id"),
        )
        return
    for layer in layers:
        stored = source.tensors[f"{layer.name}.weight"].dtype
        if stored not in PLAIN_DTYPES:
            note(
                PreflightError(
                    f"{layer.name} is stored as {stored}, not in {', '.join(PLAIN_DTYPES)}",
                    remedy="start from the model as it was before it was quantized",
                ),
                ("model", "id"),
            )
            return
    for index, pattern in enumerate(draft.spec.skip):
        if pattern != OUTPUT_HEAD and not any(is_skipped(name, (pattern,)) for name in names):
            note(
                SpecError(f"{pattern!r} matches no layer", remedy=f"names look like {names[0]}"),
                (*draft.location, "skip", index),
            )
    remaining = [layer for layer in layers if not is_skipped(layer.name, draft.spec.skip)]
    if not remaining:
        note(SpecError("every layer is skipped", remedy="skip fewer"), (*draft.location, "skip"))
    with plugin_fault(draft.installed, "sparsity_pattern"):
        method.sparsity_pattern()  # asked for again when the result is checked: better that it fails now
    schemes = possible_schemes(draft, method)
    if schemes:
        splits = split_fused_groups(names, draft.spec.skip)
        if splits:
            more = f" (and {len(splits) - 1} more layers)" if len(splits) > 1 else ""
            note(SpecError(splits[0] + more), (*draft.location, "skip"))
        for unpackable in dict.fromkeys(filter(None, map(check_scheme, schemes))):
            note(SpecError(unpackable), (*draft.location, "with"))
        problems = [problem for s in schemes for problem in unquantizable(source.config, names, draft.spec.skip, s)]
        if len(schemes) > 1:
            problems += several_schemes(names, schemes)
        for place, what, remedy in dict.fromkeys(problems):
            note(SpecError(what, remedy=remedy), (*draft.location, *place) if place else draft.place)
    refused: dict[tuple[str, str], list[str]] = {}
    for layer in remaining:
        with plugin_fault(draft.installed, "check_layer"):
            fault = method.check_layer(layer)
            if fault:
                parameter, what = fault
                refused.setdefault((str(parameter), str(what)), []).append(layer.name)
    for (parameter, what), where in refused.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        note(SpecError(f"{what} of {where[0]}{more}"), (*draft.location, "with", parameter))
    if isinstance(method, MixedMethod) and remaining and not refused:
        with plugin_fault(draft.installed, "choose"):
            try:
                planned_schemes(source, method, draft.spec.skip)
            except SpecError as error:
                note(error, (*draft.location, "with"))


def possible_schemes(draft: Draft, method: LayerMethod) -> list[QuantScheme]:
    """Return the scheme of the result, or of every option; none of a method that does not quantize."""
    parts: Sequence[LayerMethod] = [method]
    if isinstance(method, MixedMethod):
        with plugin_fault(draft.installed, "options"):
            parts = list(method.options())
    found = []
    with plugin_fault(draft.installed, "scheme"):
        for part in parts:
            scheme = part.scheme()
            if scheme is None and part is method:
                return []
            if not isinstance(scheme, QuantScheme):
                raise TypeError(f"it returned {type(scheme).__name__}, not a QuantScheme")
            found.append(scheme)
    return found
