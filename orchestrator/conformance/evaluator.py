"""Checks for an `Evaluator`: the pruned tiny model against the dense one, and the dense one against itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from orchestrator.bootstrap import Samples
from orchestrator.canonical import digest_of
from orchestrator.checkpoint import Checkpoint
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.gates import base_of
from orchestrator.method import Evaluator, Measured
from orchestrator.recalibration import Progress, Recalibration, Remade, Variant

# A metric with one of these in its name is of the machine, not of the model, and differs from run to run.
NOISY = ("second", "memory", "time", "latency", "speed", "throughput")
TWIN = "dense_"


def check_evaluator(method: Evaluator, laboratory: Laboratory, findings: Findings) -> None:
    """The checks E1 to E6, C7 and C8."""
    first = _measure(method, laboratory.pruned, laboratory, 0, findings)
    if first is None:
        return
    itself = _measure(method, laboratory.dense, laboratory, 1, findings)
    if itself is None:
        return
    for name in sorted(_twins(itself)):
        findings.expect(
            "E4 fair",
            itself[name] == itself[TWIN + name],
            f"for one and the same model, {name} is {itself[name]!r} and {TWIN + name} is {itself[TWIN + name]!r}; "
            "measure both models in the same way",
        )
    repeatable = {TWIN + name for name in _twins(first) if TWIN + name in itself}
    _check_repeated(first, itself, repeatable, findings)
    # What has no twin of the dense model needs a run of its own, unless it is only the ratio of such a pair.
    alone = {name for name in first if name not in repeatable and name not in _twins(first)}
    alone = {name for name in alone if not _noisy(name) and not name.endswith("_ratio")}
    if alone:
        again = _measure(method, laboratory.pruned, laboratory, 1, findings)
        if again is not None:
            _check_repeated(first, again, alone, findings)


def _measure(
    method: Evaluator, candidate: Checkpoint, laboratory: Laboratory, global_seed: int, findings: Findings
) -> Mapping[str, float] | None:
    """Measure against the dense model; None if that failed or what came out is no mapping of declared numbers."""
    context = laboratory.context(0, laboratory.calibration(), lambda fraction, message: None)
    context = replace(context, variants=_variants(method, candidate, laboratory))
    measured: Mapping[str, float] | Measured | None = None
    samples: Sequence[Samples] = ()
    with findings.attempt("E1 runs", "`measure`"), left_alone(findings, "`measure`", seed=global_seed):
        measured = method.measure(candidate, laboratory.dense, context)
    if findings.failed("E1 runs"):
        return None
    if isinstance(measured, Measured):
        _check_curves(measured, findings)
        samples, measured = measured.samples, measured.metrics
    if not isinstance(measured, Mapping):
        findings.fail("E1 runs", f"`measure` returned {type(measured).__name__}; return a dict of name to number")
        return None
    declared = set(method.declared())
    missing, extra = sorted(declared - set(measured)), sorted(set(measured) - declared)
    findings.expect("E2 declared", not missing, f"{', '.join(missing)} declared in `metrics`, but not measured")
    findings.expect(
        "E2 declared",
        not extra,
        f"{', '.join(map(str, extra))} measured, but not declared in `metrics`, so that no gate can refer to it",
    )
    bad = sorted(name for name, value in measured.items() if not _finite(value))
    for name in bad:
        findings.fail("E3 finite", f"{name} is {measured[name]!r}; return a finite int or float, or raise StepError")
    if missing or bad:
        return None
    _check_samples(method, measured, samples, findings)
    return measured


def _variants(method: Evaluator, candidate: Checkpoint, laboratory: Laboratory) -> tuple[Variant, ...]:
    """What the core would make of the method's recalibrations; the model of each is the candidate, its text its own."""

    @contextmanager
    def remade(asked: Recalibration, progress: Progress) -> Iterator[Remade]:
        progress(1.0, "made")
        yield Remade(candidate, laboratory.calibration(asked.source, asked.seed))

    return tuple(
        Variant(asked, digest_of([asked.name, candidate.path.name]), partial(remade, asked))
        for asked in method.recalibrations()
    )


def _check_curves(measured: Measured, findings: Findings) -> None:
    for name, curve in measured.curves.items():
        places = [place for place, _ in curve]
        findings.expect(
            "E5 curves",
            all(type(place) is int for place in places) and places == sorted(set(places)),
            f"the places of the curve {name} are not whole numbers that rise",
        )
        bad = [place for place, value in curve if not _finite(value)]
        findings.expect("E5 curves", not bad, f"the curve {name} is not finite at {bad[:3]}")


def _check_samples(
    method: Evaluator, metrics: Mapping[str, float], given: Sequence[Samples], findings: Findings
) -> None:
    """Samples give the metrics that they are said to, and every metric that is declared to have some."""
    faults = [fault for samples in given for fault in samples.faults(metrics)]
    findings.expect("E6 samples", not faults, f"the samples do not fit the metrics: {'; '.join(faults)}")
    sampled = {metric for samples in given for metric in samples.metrics}
    lacking = sorted(name for name in method.declared() if base_of(name) in method.sampled and name not in sampled)
    findings.expect("E6 samples", not lacking, f"{', '.join(lacking)} declared in `sampled`, but no samples give them")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _noisy(name: str) -> bool:
    return any(word in name for word in NOISY)


def _twins(measured: Mapping[str, float]) -> set[str]:
    """The metrics of the candidate that are also measured of the dense model, and are not noisy."""
    return {name for name in measured if TWIN + name in measured and not _noisy(name)}


def _check_repeated(one: Mapping[str, float], other: Mapping[str, float], names: set[str], findings: Findings) -> None:
    for name in sorted(names):
        findings.expect(
            "C8 deterministic",
            one[name] == other[name],
            f"{name} of one and the same model is {one[name]!r} and then {other[name]!r}; draw only from generators "
            "seeded with context.seed",
        )
