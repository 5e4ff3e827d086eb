"""What a report says of a run: gates with their margins, the verdict, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.html_report.facts import INTERVALS_FILE, RunView, StepView, read_json
from orchestrator.report import Row, metric_rows, shown

MEASURED_ON = "What it was measured on"
GROUPS = ("Quality", "Size", "Speed", MEASURED_ON)
_MEASURED_ON = re.compile(r"(^|_)(tokens|overlap|questions|variants)$")
_DEMANDS = {"max": "at most ", "min": "at least ", "retain": "retains at least "}


@dataclass(frozen=True)
class Gate:
    """One bound and what it was held against, as `orchestrator.gates` left it in the journal.

    bound: "min", "max", "retain" or "must_not_fall". interval: of the value, where the bound asks for confidence; its
    worse end was then held against the limit. passed: None where nothing was measured.
    """

    step: str
    metric: str
    bound: str
    limit: float
    value: float | None = None
    interval: tuple[float, float] | None = None
    confidence: float | None = None
    passed: bool | None = None
    what: str = ""

    @property
    def word(self) -> str:
        """ "pass", "fail" or "not measured"."""
        return "not measured" if self.passed is None else "pass" if self.passed else "fail"

    @property
    def demand(self) -> str:
        """What is demanded, up to the number if there is one."""
        return _DEMANDS.get(self.bound, "not worse than dense")

    @property
    def unit(self) -> str:
        """The name by which its numbers are shown: a share of the dense model's has no unit."""
        return "share" if self.bound == "retain" else self.metric

    @property
    def sure(self) -> str:
        """How sure one has to be, in words; empty where the value alone counts."""
        if self.confidence is None:
            return ""
        chance = " beyond chance," if self.bound == "must_not_fall" else " with"
        return f"{chance} {100 * self.confidence:.6g} % confidence"

    @property
    def margin(self) -> float | None:
        """How far what was held against the limit is inside it, negative outside; None without a limit or a value."""
        if self.value is None or self.bound == "must_not_fall":
            return None
        low, high = self.interval or (self.value, self.value)
        return self.limit - high if self.bound == "max" else low - self.limit

    @property
    def share(self) -> float | None:
        """The margin as a share of the bound; None without a margin, or if the bound is zero."""
        return None if self.margin is None or not self.limit else self.margin / abs(self.limit)


def gates_of(run: RunView) -> list[Gate]:
    """Every bound of the run's steps, in the order of the plan; also those that were never reached."""
    found: list[Gate] = []
    for step in run.steps:
        found += [_gate(step, entry) for entry in step.gates] if step.gates else _demanded(step)
    return found


def _gate(step: StepView, entry: Mapping[str, Any]) -> Gate:
    ends = entry.get("interval")
    return Gate(
        step.label,
        str(entry["metric"]),
        str(entry["bound"]),
        float(entry["limit"]),
        float(entry["value"]),
        (float(ends[0]), float(ends[1])) if ends else None,
        entry.get("confidence"),
        bool(entry["passed"]),
        str(entry.get("what", "")),
    )


def _demanded(step: StepView) -> list[Gate]:
    """The bounds of a step without a result."""
    demands = step.demands or {}
    bounds = [
        Gate(step.label, metric, side, float(bound[side]))
        for metric, bound in demands.get("require", {}).items()
        for side in ("min", "max", "retain")
        if side in bound
    ]
    return bounds + [Gate(step.label, metric, "must_not_fall", 0.0) for metric in demands.get("must_not_fall", ())]


@dataclass(frozen=True)
class Verdict:
    """The run in a word and a sentence. word: "passed", "refused", "failed", "unfinished" or "no gates"."""

    word: str
    sentence: str

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the result."""
        return self.word in ("passed", "no gates")


def verdict_of(run: RunView, gates: Sequence[Gate]) -> Verdict:
    """What became of a run."""
    failed = [gate for gate in gates if gate.passed is False]
    unmeasured = [gate for gate in gates if gate.passed is None]
    broken = next((step for step in run.steps if step.state == "failed"), None)
    count = f"{len(gates)} gate{'' if len(gates) == 1 else 's'}"
    if failed:
        rest = f"; {len(unmeasured)} more not measured" if unmeasured else ""
        return Verdict("refused", f"{len(failed)} of {count} not met: {_named(failed)}{rest}")
    if broken and run.refused:  # a register step looks at its bounds before there is an artifact
        return Verdict("refused", f"{broken.label} was refused by a gate")
    if broken:
        rest = f"; {len(unmeasured)} of {count} had nothing to measure" if unmeasured else ""
        return Verdict("failed", f"{broken.label} failed{rest}")
    left = next((f"step {step.index + 1}, {step.label}" for step in run.steps if step.state == "unfinished"), None)
    if run.ending == "failed":
        return Verdict("failed", f"the run ended in {left}" if left else "the run ended before its last step")
    if run.ending == "unfinished":
        where = f"still at work in {left}, or was killed there" if left else "still at work, or was killed"
        return Verdict("unfinished", f"the journal has no end: the run is {where}")
    if unmeasured:
        return Verdict("unfinished", f"{len(unmeasured)} of {count} were not measured")
    if not gates:
        known = run.run is not None and all(step.demands is not None for step in run.steps)
        why = "the specification sets no bounds" if known else "no record of bounds was found"
        return Verdict("no gates", f"{'finished; ' if run.ending else ''}{why}")
    return Verdict("passed", f"{'the gate was' if len(gates) == 1 else f'all {count} were'} met")


def _named(gates: Sequence[Gate]) -> str:
    """Every metric once, with what was demanded of it."""
    demands: dict[str, list[str]] = {}
    for gate in gates:
        limit = "" if gate.bound == "must_not_fall" else shown(gate.unit, gate.limit)
        demands.setdefault(gate.metric, []).append(f"{gate.demand}{limit}")
    return ", ".join(f"{metric} ({'; '.join(dict.fromkeys(said))})" for metric, said in demands.items())


@dataclass(frozen=True)
class Measured:
    """A metric of the table: its group, and its interval where one was measured."""

    row: Row
    group: str  # one of `GROUPS`
    interval: tuple[float, float] | None


def measured_of(run: RunView) -> list[Measured]:
    """What the validate steps measured, dense beside compressed."""
    outcomes = [{"stage": step.stage, "metrics": step.metrics} for step in run.steps if step.artifact]
    intervals: dict[str, tuple[float, float]] = {}
    for step in run.steps:
        if step.stage == "validate":
            intervals |= intervals_of(step)
    return [Measured(row, group_of(row.name), intervals.get(row.name)) for row in metric_rows(outcomes)]


def intervals_of(step: StepView) -> dict[str, tuple[float, float]]:
    """The confidence intervals that a step kept, by metric; {} if it kept none, or they cannot be read."""
    found = read_json(step.artifact, INTERVALS_FILE) if step.artifact else None
    if not isinstance(found, dict):
        return {}
    pairs = {name: ends for name, ends in found.items() if isinstance(ends, list) and len(ends) == 2}
    return {name: (float(low), float(high)) for name, (low, high) in pairs.items()}


def group_of(metric: str) -> str:
    """Where a metric belongs, by its name: every unit of size and time is part of one."""
    if _MEASURED_ON.search(metric.partition(".")[0]):
        return MEASURED_ON
    if "bytes" in metric:
        return "Size"
    return "Speed" if re.search(r"(^|_)(seconds?|ms|latency|per_second)(_|\.|$)", metric) else "Quality"
