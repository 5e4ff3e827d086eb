"""How a step of each method kind is carried out: inputs and a working folder in, facts for the manifest out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.bootstrap import CONFIDENCE, FEWEST_UNITS
from orchestrator.calibration import CalibrationSet
from orchestrator.canonical import canonical_json
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import StepError
from orchestrator.foreseen import check_foreseen
from orchestrator.gates import INTERVALS_FILE, SAMPLES_FILE
from orchestrator.layer_method import LayerMethod, MixedMethod
from orchestrator.method import TRAINED_TOKENS, Calibrator, Context, Evaluator, Invariant, Measured, ModelMethod
from orchestrator.plan import Step
from orchestrator.recalibration import Variant
from orchestrator.scheme import QuantScheme

if TYPE_CHECKING:
    import torch

METRICS_FILE = "metrics.json"
CURVES_FILE = "curves.json"  # by name, [update or place, value] in their order
TRAINED_FOLDER = "trained_on"  # of a model artifact: the windows that its step trained on, if not the calibration set


@dataclass(frozen=True)
class StepInputs:
    """What a step reads, in the roles that the plan gave it."""

    model: Checkpoint
    dense: Checkpoint
    calibration: CalibrationSet | None
    invariants: Mapping[str, Any]  # of the model
    seed: int
    scratch: Path
    progress: Callable[[float, str], None]
    model_digest: str
    state: Path  # where a step that can be resumed keeps its progress
    statistics: Path  # where records of calibration are kept
    cache: Path | None = None  # what model methods keep for each other
    workers: int | None = None  # of a walk; None: as many as torch has threads
    variants: tuple[Variant, ...] = ()  # of an evaluator that asks for some
    trained_on: tuple[CalibrationSet, ...] = ()  # of an evaluator, what the steps before trained on

    def context(self) -> Context:
        """The context that a method gets."""
        return Context(
            self.seed,
            self.dense,
            self.calibration,
            self.scratch,
            self.progress,
            checkpoint=self.model,
            held=frozenset(Invariant(name) for name in self.invariants),
            state=self.state,
            cache=self.cache,
            variants=self.variants,
            trained_on=self.trained_on,
        )


@dataclass(frozen=True)
class StepFacts:
    """What goes into the artifact's manifest beside its files."""

    kind: str  # "calibration", "model" or "report"
    metrics: Mapping[str, float]
    invariants: Mapping[str, Any]


def perform(step: Step, inputs: StepInputs, folder: Path) -> StepFacts:
    """Carry out a calibrate, prune, distill, quantize or validate step, writing its files into `folder`.

    Raises `OrchestratorError` for what the user can mend; whatever else a method raises passes through.
    """
    method = step.method
    if isinstance(method, Calibrator):
        return _calibrate(method, inputs, folder)
    if isinstance(method, LayerMethod):
        return _compress_layers(step, method, inputs, folder)
    if isinstance(method, ModelMethod):
        return _change_model(step, method, inputs, folder)
    if isinstance(method, Evaluator):
        return _evaluate(step, method, inputs, folder)
    raise TypeError(f"{type(method).__name__} is not performed here")


def _calibrate(method: Calibrator, inputs: StepInputs, folder: Path) -> StepFacts:
    drawn = method.sample(inputs.model.load_tokenizer(), inputs.seed)
    num_sequences, num_tokens = drawn.tokens_NT.shape
    vocabulary = int(inputs.model.config.get("vocab_size", drawn.tokens_NT.max() + 1))
    if drawn.tokens_NT.max() >= vocabulary or drawn.tokens_NT.min() < 0:
        raise StepError(
            f"{method.name} gave token {int(drawn.tokens_NT.max())}, but the model knows {vocabulary} tokens",
            remedy="use the tokenizer that belongs to the model",
        )
    drawn.save(folder)
    return StepFacts("calibration", {"sequences": num_sequences, "tokens": num_sequences * num_tokens}, {})


def _compress_layers(step: Step, method: LayerMethod, inputs: StepInputs, folder: Path) -> StepFacts:
    from orchestrator.allocation import SURVEY_SHARE, Allocation, allocate
    from orchestrator.export import ModelWriter
    from orchestrator.invariants import check_artifact, grid_fact
    from orchestrator.job import WalkSettings
    from orchestrator.records import RecordStore, limit_from
    from orchestrator.walk import walk

    settings = WalkSettings(
        inputs=step.calibrated_on or method.inputs,
        device=step.device,
        workers=inputs.workers,
        state=inputs.state,
        records=RecordStore(inputs.statistics, limit_from(os.environ)),
        identity={
            "model": inputs.model_digest,
            "core": step.identity["core"],
            "environment": step.identity["environment"],
        },
    )
    allocation = Allocation({}, {})
    scheme: QuantScheme | Mapping[str, QuantScheme] | None = method.scheme()
    progress = inputs.progress
    if isinstance(method, MixedMethod):
        allocation = allocate(
            inputs.model,
            method,
            inputs.calibration,
            skip=step.skip,
            settings=settings,
            scratch=inputs.scratch,
            progress=_part(progress, 0.0, SURVEY_SHARE),
        )
        scheme, progress = allocation.schemes(), _part(progress, SURVEY_SHARE, 1.0)
    with closing(ModelWriter(inputs.model, folder, scheme=scheme, skip=step.skip)) as writer:
        report = walk(
            inputs.model,
            method,
            inputs.calibration,
            writer,
            skip=step.skip,
            progress=progress,
            settings=settings,
            methods=allocation.methods,
        )
        writer.finish()
    claims: dict[str, Any] = {}
    if Invariant.ZEROS in method.provides:
        claims["zeros"] = {"pattern": method.sparsity_pattern(), "skip": list(step.skip)}
    if writer.schemes:
        claims["grid"] = grid_fact(writer.schemes)
    invariants = check_artifact(
        inputs.model, Checkpoint(folder, code=inputs.model.code), kept=inputs.invariants, claims=claims
    )
    (folder / "layers.json").write_bytes(canonical_json(report.layers))
    return StepFacts("model", finite(method.name, {**report.metrics, **allocation.metrics}), invariants)


def _part(progress: Callable[[float, str], None], begin: float, end: float) -> Callable[[float, str], None]:
    """Progress of a part of a step, as progress of the step."""
    return lambda fraction, message: progress(begin + (end - begin) * fraction, message)


def _change_model(step: Step, method: ModelMethod, inputs: StepInputs, folder: Path) -> StepFacts:
    from orchestrator.export import encodings_of, kv_scales_of, save_model
    from orchestrator.invariants import check_artifact

    context = inputs.context()
    method.prepare(context)
    result = method.apply(inputs.model.load(), context)
    grid, scales = (inputs.model if kept in method.keeps else None for kept in (Invariant.GRID, Invariant.KV_SCALES))
    save_model(
        result.model,
        inputs.model,
        folder,
        encodings=encodings_of(result, grid),
        kv_scales=kv_scales_of(result, scales),
    )
    _write_curves(result.curves, folder)
    if result.trained_on is not None:
        _keep_trained(result.trained_on, folder / TRAINED_FOLDER)
    changed = Checkpoint(folder, code=inputs.model.code)
    check_foreseen(step.gives, changed, result.blocks)
    claims: dict[str, Any] = {"kv_scales": {}} if Invariant.KV_SCALES in method.provides else {}
    invariants = check_artifact(inputs.model, changed, kept=inputs.invariants, claims=claims, blocks=result.blocks)
    return StepFacts("model", finite(method.name, result.metrics), invariants)


def _keep_trained(tokens_NT: torch.Tensor, folder: Path) -> None:
    """Keep the first windows [N, T]; they come in random order."""
    import torch

    kept_NT = tokens_NT[: max(1, TRAINED_TOKENS // tokens_NT.shape[1])].to(torch.int32)
    folder.mkdir()
    CalibrationSet(kept_NT, {"sequences": len(tokens_NT), "kept": len(kept_NT)}).save(folder)


def _evaluate(step: Step, method: Evaluator, inputs: StepInputs, folder: Path) -> StepFacts:
    result = method.measure(inputs.model, inputs.dense, replace(inputs.context(), policy=step.policy))
    if not isinstance(result, Measured):
        result = Measured(result)
    measured = finite(method.name, result.metrics)
    missing = sorted(set(method.declared()) - set(measured))
    if missing:
        raise StepError(f"{method.name} did not measure {', '.join(missing)}, which it declares")
    (folder / METRICS_FILE).write_text(json.dumps(measured, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, curve in result.curves.items():
        finite(method.name, {f"{name} at {place}": value for place, value in curve})
    _write_curves(result.curves, folder)
    _write_samples(method.name, result, inputs.seed, folder)
    return StepFacts("report", measured, {})


def _write_samples(name: str, result: Measured, seed: int, folder: Path) -> None:
    """Keep what metrics follow from, and their intervals."""
    if not result.samples:
        return
    faults = [fault for samples in result.samples for fault in samples.faults(result.metrics)]
    if faults:
        raise StepError(f"{name} gave samples that do not fit its metrics: {'; '.join(faults)}")
    (folder / SAMPLES_FILE).write_bytes(canonical_json([samples.as_dict() for samples in result.samples]))
    intervals: dict[str, tuple[float, float]] = {}
    for samples in result.samples:
        intervals |= samples.intervals(CONFIDENCE, seed) if samples.units >= FEWEST_UNITS else {}
    (folder / INTERVALS_FILE).write_bytes(canonical_json(intervals))


def _write_curves(curves: Mapping[str, Sequence[tuple[int, float]]], folder: Path) -> None:
    if curves:
        points = {name: [[place, value] for place, value in curve] for name, curve in curves.items()}
        (folder / CURVES_FILE).write_bytes(canonical_json(points))


def finite(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Numbers as plain Python numbers; a NaN or infinity is a fault of the step, not a result."""
    plain = {key: value if isinstance(value, int) else float(value) for key, value in metrics.items()}
    bad = sorted(key for key, value in plain.items() if not math.isfinite(value))
    if bad:
        raise StepError(f"{name} measured {', '.join(f'{key} = {plain[key]}' for key in bad)}", remedy="see the model")
    return plain
