"""Checks for a `ModelMethod`: it runs on a real tiny model, and what it returns is saved, loaded and compared.

Shape legend: B = sequences, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.conformance.bits import same_bytes
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.export import encodings_of, kv_scales_of, save_model
from orchestrator.foreseen import ask, check_foreseen, foresee_model
from orchestrator.invariants import check_artifact
from orchestrator.method import Invariant, ModelMethod, ModelResult

if TYPE_CHECKING:
    import torch


def check_model_method(method: ModelMethod, laboratory: Laboratory, findings: Findings) -> None:
    """The checks M1 to M5, C7 and C8."""
    calibration = laboratory.calibration() if method.needs_calibration() else None
    first_student, *others = _students(method, laboratory)
    for other in others:
        made = _apply(method, other, laboratory, calibration, 0, findings)
        if made is None:
            return
        _check_saved(method, other, made, laboratory, findings)
    states: list[dict[str, torch.Tensor]] = []
    for attempt, global_seed in enumerate((0, 0, 1)):
        result = _apply(method, first_student, laboratory, calibration, global_seed, findings)
        if result is None:
            return
        if attempt == 0:
            _check_saved(method, first_student, result, laboratory, findings)
        states.append({name: tensor.clone() for name, tensor in result.model.state_dict().items()})
    first, second, third = states
    if findings.expect(
        "C8 deterministic",
        _same_state(first, second),
        "`apply` gave two models for one input and seed; draw only from generators seeded with context.seed",
    ):
        findings.expect(
            "C8 deterministic",
            _same_state(first, third),
            "the result of `apply` depends on the global random seed; draw only from generators seeded with "
            "context.seed, or seed inside torch.random.fork_rng()",
        )


def _students(method: ModelMethod, laboratory: Laboratory) -> list[Checkpoint]:
    """What the method is tried on: models that have what it needs, and what it says it keeps."""
    plain = laboratory.pruned if Invariant.ZEROS in method.keeps else laboratory.dense
    if Invariant.GRID in method.requires:
        return [laboratory.quantized]
    return [plain, laboratory.quantized] if Invariant.GRID in method.keeps else [plain]


def _apply(
    method: ModelMethod,
    student: Checkpoint,
    laboratory: Laboratory,
    calibration: CalibrationSet | None,
    global_seed: int,
    findings: Findings,
) -> ModelResult | None:
    def progress(fraction: float, message: str) -> None:
        findings.expect(
            "M4 progress",
            isinstance(fraction, int | float) and 0 <= fraction <= 1 and isinstance(message, str),
            f"context.progress was called with ({fraction!r}, {message!r}); give a number from 0 to 1 and a str",
        )

    model, context = student.load(), laboratory.context(0, calibration, progress, student)
    result = None
    with findings.attempt("M1 runs", "`apply`"), left_alone(findings, "`apply`", seed=global_seed):
        result = method.apply(model, context)
    if result is None:
        findings.expect("M1 runs", findings.failed("M1 runs"), "`apply` returned None; return a ModelResult")
        return None
    if not isinstance(result, ModelResult):
        findings.fail("M1 runs", f"`apply` returned {type(result).__name__}; return a ModelResult")
        return None
    for name, value in result.metrics.items():
        finite = isinstance(value, int | float) and math.isfinite(value)
        findings.expect("M1 runs", finite, f"the metric {name} is {value!r}; return a finite float")
    return result


def _check_saved(
    method: ModelMethod, student: Checkpoint, result: ModelResult, laboratory: Laboratory, findings: Findings
) -> None:
    folder = laboratory.folder / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    with findings.attempt("M2 saves", "saving and loading the result of `apply`"):
        kept = student if Invariant.GRID in method.keeps else None
        save_model(
            result.model, student, folder, encodings=encodings_of(result, kept), kv_scales=kv_scales_of(result, None)
        )
        expected_BTV, actual_BTV = _logits(result.model), _logits(Checkpoint(folder).load())
        finite = bool(expected_BTV.isfinite().all())
        if findings.expect("M2 saves", finite, "the logits of the result are not finite; keep the update small"):
            findings.expect(
                "M2 saves",
                expected_BTV.shape == actual_BTV.shape and bool((expected_BTV - actual_BTV).abs().max() < 1e-4),
                "the saved model gives other logits than the returned one; return a plain Transformers model: no "
                "wrappers, adapters merged, dtype as it was",
            )
    if not findings.failed("M2 saves"):
        planned = laboratory.dense if student.is_quantized else student  # planning reckons with dense shapes
        _check_invariants(method, student, planned, result.blocks, folder, findings)


def _check_invariants(
    method: ModelMethod,
    student: Checkpoint,
    planned: Checkpoint,
    blocks: tuple[int, ...] | None,
    folder: Path,
    findings: Findings,
) -> None:
    kept: dict[str, dict[str, str]] = {}
    if student.is_quantized:
        kept["grid"] = {}
    elif Invariant.ZEROS in method.keeps:
        kept["zeros"] = {"pattern": "2:4"}
    claimed = method.provides & {Invariant.ZEROS, Invariant.KV_SCALES}
    claims: dict[str, dict[str, str]] = {invariant.value: {} for invariant in claimed}
    remedy = "hold what `keeps` and `provides` claim (a mask after every update), or do not claim it"
    with findings.attempt("M3 keeps what it claims", f"holding the saved model against its claims ({remedy})"):
        check_artifact(student, Checkpoint(folder), kept, claims=claims, blocks=blocks)
    with findings.attempt("M5 foreseen", "comparing the saved model with `blocks_removed` and `config_after`"):
        foreseen = foresee_model(method, planned, lambda config: ask(method, planned, config))
        check_foreseen(foreseen, Checkpoint(folder), blocks)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    import torch

    tokens_BT = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits_BTV: torch.Tensor = model(input_ids=tokens_BT, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    return logits_BTV


def _same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bytes(tensor, other[name]) for name, tensor in one.items())
