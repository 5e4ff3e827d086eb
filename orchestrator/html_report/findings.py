"""What a report says of a run: gates with their margins, layers with their errors, what did not go as it should."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.html_report.facts import INTERVALS_FILE, LAYERS_FILE, Missing, RunView, StepView, read_json
from orchestrator.report import Row, metric_rows

# What a layer's error is called, the one nearest to the model's output first.
ERRORS = ("relative_proxy_loss", "relative_weight_error")
# Metric of a layer -> what it means for people if it is not zero; in the order in which they worry.
TROUBLES: Mapping[str, str] = {
    "unseen_experts": "expert that saw no token; compressed as if all inputs were alike",
    "starved_experts": "expert with fewer tokens than inputs",
    "fallback_rtn": "fell back to rounding to nearest",
    "fallback_diagonal": "fell back to the diagonal of the Hessian",
    "damping_raised": "damping had to be raised",
    "rank_deficient_layers": "fewer calibration tokens than inputs",
    "dead_inputs": "inputs that were always zero",
    "zero_groups": "groups of weights that are all zero",
}
_LAYER = re.compile(r"^(?:(?P<stem>.*?)\.)?(?P<list>layers|h|blocks)\.(?P<block>\d+)\.(?P<role>.+)$")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.|$)")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


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
    def margin(self) -> float | None:
        """How far what was held against the limit is inside it, negative outside; None without a limit or a value."""
        if self.value is None or self.bound == "must_not_fall":
            return None
        low, high = self.interval or (self.value, self.value)
        return self.limit - high if self.bound == "max" else low - self.limit


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
        return Verdict("refused", f"{len(failed)} of {count} not met: {', '.join(g.metric for g in failed)}")
    if broken and run.refused:  # a register step looks at its bounds before there is an artifact
        return Verdict("refused", f"{broken.label} was refused by a gate")
    if broken:
        rest = f"; {len(unmeasured)} of {count} had nothing to measure" if unmeasured else ""
        return Verdict("failed", f"{broken.label} failed{rest}")
    if run.ending == "failed":
        return Verdict("failed", "the run ended before its last step")
    if run.ending == "unfinished":
        return Verdict("unfinished", "the journal has no end: the run is still at work, or was killed")
    if unmeasured:
        return Verdict("unfinished", f"{len(unmeasured)} of {count} were not measured")
    if not gates:
        known = run.run is not None and all(step.demands is not None for step in run.steps)
        why = "the specification sets no bounds" if known else "no record of bounds was found"
        return Verdict("no gates", f"{'finished; ' if run.ending else ''}{why}")
    return Verdict("passed", f"{'the gate was' if len(gates) == 1 else f'all {count} were'} met")


@dataclass(frozen=True)
class Measured:
    """A metric of the table: its group, and its interval where one was measured."""

    row: Row
    group: str  # "Quality", "Size" or "Speed"
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
    if "bytes" in metric:
        return "Size"
    return "Speed" if re.search(r"(^|_)(seconds?|ms|latency|per_second)(_|\.|$)", metric) else "Quality"


@dataclass(frozen=True)
class LayerCell:
    """A layer, or the experts of a block in one role: the worst error, and what happened to them.

    troubles: metric -> sum over the layers; only what is not zero.
    """

    block: int
    role: str
    error: float | None
    worst: str
    count: int
    troubles: Mapping[str, float]


@dataclass(frozen=True)
class LayerMap:
    """The layers that a step compressed. metric: which error; None if the method reports none."""

    step: StepView
    metric: str | None
    blocks: Sequence[int]
    roles: Sequence[str]
    cells: Mapping[tuple[int, str], LayerCell]
    layers: Mapping[str, Mapping[str, float]]

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The layers with the largest errors, the largest first."""
        found = self._errors()
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:count]

    def block_mean(self, block: int) -> float | None:
        """Mean error of the layers of a block, every layer counted once."""
        errors = [error for name, error in self._errors() if split_layer(name)[0] == block]
        return math.fsum(errors) / len(errors) if errors else None

    def _errors(self) -> list[tuple[str, float]]:
        metric = self.metric
        return [(name, values[metric]) for name, values in self.layers.items() if metric and metric in values]


def split_layer(name: str) -> tuple[int, str]:
    """Number of the block, and the role in it with the number of an expert left out; (-1, name) for others."""
    match = _LAYER.match(name)
    return (int(match["block"]), _EXPERT.sub("*", match["role"])) if match else (-1, name)


def layer_map(step: StepView) -> LayerMap | Missing | None:
    """What a step reported of its layers; None if it is no method of layers."""
    if step.artifact is None:
        return None
    found = read_json(step.artifact, LAYERS_FILE)
    if found is None or isinstance(found, Missing):
        return found
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        return Missing(f"{LAYERS_FILE} does not list layers")
    layers = {name: _numbers(values) for name, values in found.items()}
    metric = next((name for name in ERRORS if any(name in values for values in layers.values())), None)
    grouped: dict[tuple[int, str], list[str]] = {}
    for name in sorted(layers):
        grouped.setdefault(split_layer(name), []).append(name)
    cells = {place: _cell(place, names, layers, metric) for place, names in grouped.items()}
    roles = sorted({role for _, role in cells}, key=_role_order)
    return LayerMap(step, metric, sorted({block for block, _ in cells}), roles, cells, layers)


def _cell(
    place: tuple[int, str], names: Sequence[str], layers: Mapping[str, Mapping[str, float]], metric: str | None
) -> LayerCell:
    errors = [(layers[name][metric], name) for name in names if metric in layers[name]] if metric else []
    error, worst = max(errors, default=(None, names[0]))
    troubles = {name: total for name in TROUBLES if (total := sum(layers[one].get(name, 0) for one in names))}
    return LayerCell(*place, error, worst, len(names), troubles)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def _role_order(role: str) -> tuple[int, int, str]:
    parts = role.split(".")
    leaf = next((_ORDER.index(part) for part in reversed(parts) if part in _ORDER), len(_ORDER))
    return (0 if any("attn" in part or "attention" in part for part in parts) else 1, leaf, role)


@dataclass(frozen=True)
class Trouble:
    """What happened to some layers of a step. total: the sum of the metric; layers: those where it is not zero."""

    step: str
    metric: str
    total: float
    layers: Sequence[str]
    of: int


def troubles_of(maps: Iterable[LayerMap]) -> list[Trouble]:
    """Everything that was damped, dead, fell back or starved, step by step."""
    found = []
    for one in maps:
        for metric in TROUBLES:
            names = [name for name in sorted(one.layers, key=natural) if one.layers[name].get(metric, 0)]
            if names:
                total = sum(one.layers[name][metric] for name in names)
                found.append(Trouble(one.step.label, metric, total, names, len(one.layers)))
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """The order of names in which block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
