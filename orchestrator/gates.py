"""Gates: what a step measured, held against the bounds of the specification. Imports no torch.

Bounds are not part of a step's fingerprint. Intervals are therefore taken here, from the samples that the artifact
keeps: another bound, or another confidence, computes nothing again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.bootstrap import CONFIDENCE, FEWEST_UNITS, Samples
from orchestrator.errors import Problem
from orchestrator.method import Evaluator
from orchestrator.sign_test import Pairs

if TYPE_CHECKING:
    from orchestrator.plan import Step

DENSE = "dense_"
RATIO = "_ratio"
SAMPLES_FILE = "samples.json"
INTERVALS_FILE = "intervals.json"  # by metric, [low, high] at `CONFIDENCE`


@dataclass(frozen=True)
class GateResult:
    """One bound and what it was held against.

    bound: "min", "max", "retain" or "must_not_fall". limit: its number; 0 for a difference. value: the metric, the
    share that is retained, or compressed - dense. interval: of `value`, at `confidence`; None where none is asked for.
    what: the same as a sentence.
    """

    metric: str
    bound: str
    limit: float
    value: float
    interval: tuple[float, float] | None
    confidence: float | None
    passed: bool
    what: str

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def base_of(metric: str) -> str:
    """The metric without its tier: "perplexity_ratio" of "perplexity_ratio.code"."""
    return metric.partition(".")[0]


def dense_of(metric: str) -> str:
    """The name of the same metric of the dense model."""
    return DENSE + metric


def ratio_of(metric: str) -> str:
    """The name of compressed / dense of a metric."""
    base, dot, tier = metric.partition(".")
    return f"{base}{RATIO}{dot}{tier}"


def read_samples(folder: Path) -> list[Samples]:
    """Return the samples that an artifact keeps; none if it keeps none."""
    path = folder / SAMPLES_FILE
    if not path.is_file():
        return []
    return [Samples.from_dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]


def read_intervals(folder: Path) -> dict[str, tuple[float, float]]:
    """Return the intervals that an artifact keeps, by metric, at `CONFIDENCE`."""
    path = folder / INTERVALS_FILE
    if not path.is_file():
        return {}
    return {name: (low, high) for name, (low, high) in json.loads(path.read_text(encoding="utf-8")).items()}


def gate_results(step: Step, metrics: Mapping[str, float], folder: Path | None) -> list[GateResult]:
    """Hold metrics against a step's bounds, in their order. folder: of the artifact, which keeps the samples."""
    needed = step.must_not_fall or any("confidence" in bound for bound in step.require.values())
    measured = _Measurement(
        metrics,
        read_samples(folder) if folder and needed else [],
        step.method.better if isinstance(step.method, Evaluator) else {},
        int(step.identity.get("seed", 0)),
    )
    results = [result for name, bound in step.require.items() for result in measured.bounded(name, bound)]
    results += [measured.fallen(name) for name in step.must_not_fall]
    return [*_without_ground(step, metrics), *results] if results else []


def _without_ground(step: Step, metrics: Mapping[str, float]) -> Iterator[GateResult]:
    """What bounds presuppose and is not so, as failed bounds; what is so needs no row of its own."""
    if isinstance(step.method, Evaluator):
        declared = step.method.declared()
        for name, (limit, remedy) in step.method.presupposed().items():
            value = metrics[name]
            if not value <= limit:
                what = f"{name} is {value:.6g}, at most {limit:.6g} is allowed where bounds rest on it"
                what += f" ({declared[name]}); {remedy}"
                yield GateResult(name, "max", limit, value, None, None, False, what)


def gate_problems(step: Step, results: Sequence[GateResult], remedy: str) -> list[Problem]:
    """Return a problem with the numbers for each gate that failed. remedy: what became of it, and what to look at."""
    return [
        Problem(
            result.what,
            f"{step.place}.{'must_not_fall' if result.bound == 'must_not_fall' else f'require.{result.metric}'}",
            remedy,
        )
        for result in results
        if not result.passed
    ]


@dataclass(frozen=True)
class _Measurement:
    metrics: Mapping[str, float]
    samples: Sequence[Samples]
    better: Mapping[str, str]
    seed: int

    def bounded(self, name: str, bound: Mapping[str, float]) -> Iterator[GateResult]:
        """The results of min, max and retain."""
        confidence = bound.get("confidence")
        if "min" in bound or "max" in bound:
            value, found = self.metrics[name], self._interval(name, confidence)
            for side in ("min", "max"):
                if side in bound:
                    yield self._held(name, side, bound[side], value, found, confidence, f"{name} is {value:.6g}")
        if "retain" in bound:
            lower = self.better[base_of(name)] == "lower"
            ratio, found = self.metrics[ratio_of(name)], self._interval(ratio_of(name), confidence)
            if isinstance(found, tuple) and lower:
                found = _inverse(found[1]), _inverse(found[0])
            kept = _inverse(ratio) if lower else ratio
            said = (
                f"{name} retains {kept:.6g} of the dense model's ({self.metrics[name]:.6g}, dense "
                f"{self.metrics[dense_of(name)]:.6g})"
            )
            yield self._held(name, "retain", bound["retain"], kept, found, confidence, said)

    def fallen(self, name: str) -> GateResult:
        """Whether the metric is worse than the dense model's beyond chance."""
        value, dense = self.metrics[name], self.metrics[dense_of(name)]
        samples = self._samples_of(name)
        said = f"{name} is {value:.6g}, dense {dense:.6g}"
        few = _too_few(samples)
        if few:
            return GateResult(name, "must_not_fall", 0.0, value - dense, None, CONFIDENCE, False, f"{said}; {few}")
        pairs = samples.pairs(name, dense_of(name))
        if pairs:
            return self._outnumbered(name, pairs, value - dense, said, samples.unit)
        low, high = samples.difference(name, dense_of(name), CONFIDENCE, self.seed)
        passed = low <= 0 if self.better[base_of(name)] == "lower" else high >= 0
        verdict = "within chance" if passed else "worse beyond chance"
        what = f"{said}: {verdict}, the {100 * CONFIDENCE:g} % interval of the difference is {low:.6g} to {high:.6g}"
        return GateResult(name, "must_not_fall", 0.0, value - dense, (low, high), CONFIDENCE, passed, what)

    def _outnumbered(self, name: str, pairs: Pairs, value: float, said: str, unit: str) -> GateResult:
        """`fallen` of what each unit has right or wrong: one-sided, at half of what `CONFIDENCE` leaves over."""
        worse = pairs.won if self.better[base_of(name)] == "lower" else pairs.lost
        chance, level = pairs.chance(worse), (1 - CONFIDENCE) / 2
        passed = chance > level
        what = (
            f"{said}: {'within chance' if passed else 'worse beyond chance'}, {pairs.lost} of {pairs.units} {unit}s "
            f"lost and {pairs.won} won, p = {chance:.3g} of the sign test at {level:.3g}"
        )
        return GateResult(name, "must_not_fall", 0.0, value, pairs.interval(CONFIDENCE), CONFIDENCE, passed, what)

    def _held(
        self,
        name: str,
        side: str,
        limit: float,
        value: float,
        found: tuple[float, float] | str | None,
        confidence: float | None,
        said: str,
    ) -> GateResult:
        allowed = f"at least {limit:.6g} is required" if side == "retain" else f"{side} allowed is {limit:.6g}"
        if isinstance(found, str):
            return GateResult(name, side, limit, value, None, confidence, False, f"{said}; {found}")
        if found is None:
            worst = value
        else:
            worst = found[1] if side == "max" else found[0]
            said += f", {100 * (confidence or 0):g} % interval {found[0]:.6g} to {found[1]:.6g}"
        passed = worst <= limit if side == "max" else worst >= limit
        return GateResult(name, side, limit, value, found, confidence, passed, f"{said}, {allowed}")

    def _samples_of(self, name: str) -> Samples:
        return next(samples for samples in self.samples if name in samples.metrics)

    def _interval(self, name: str, confidence: float | None) -> tuple[float, float] | str | None:
        """The ends; why there are none; or None if none is asked for."""
        if confidence is None:
            return None
        samples = self._samples_of(name)
        return _too_few(samples) or samples.interval(name, confidence, self.seed)


def _inverse(ratio: float) -> float:
    """1 / ratio; where nothing is left of what there should be little of, a number larger than any share asked for."""
    return 1 / ratio if ratio > 1e-12 else 1e12


def _too_few(samples: Samples) -> str:
    if samples.units >= FEWEST_UNITS:
        return ""
    found = f"{samples.units} {samples.unit}s are" if samples.units != 1 else f"one {samples.unit} is"
    return f"{found} too few for an interval: it takes {FEWEST_UNITS}"
