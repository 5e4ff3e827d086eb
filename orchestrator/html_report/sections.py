"""The sections of the page about a run: gates, what was measured, curves, and the steps with what they took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.html_report.charts import line_chart, pair_bars
from orchestrator.html_report.facts import CURVES_FILE, Missing, RunView, StepView, read_json
from orchestrator.html_report.findings import (
    GROUPS,
    MEASURED_ON,
    Gate,
    Measured,
    measured_of,
)
from orchestrator.html_report.markup import Child, Html, element, join
from orchestrator.html_report.palette import SERIES
from orchestrator.html_report.tables import (
    absent,
    breakable,
    digest,
    folded,
    interval,
    missing,
    number,
    seconds_text,
    section,
    slim,
    table,
    verdict,
)

_UNITS = ("perplexity", "loss", "bytes", "kl", "divergence", "accuracy", "learning_rate", "seconds")


def gate_section(run: RunView, gates: Sequence[Gate]) -> Html:
    """Every bound with its value, and the margin that was left."""
    if gates:
        rows = [gate_row(gate) for gate in gates]
        headings = ("gate", "verdict", "bound", "value #", "interval #", "margin #")
        return section(
            "gates", table("What the specification demands, beside what was measured", headings, rows, "card")
        )
    if run.run is None or any(step.demands is None for step in run.steps):
        return section("gates", missing("Which bounds were demanded is not recorded with these artifacts."))
    return section("gates", missing("The specification demands nothing: no step has a `require`."))


_OF_VALUE = {"must_not_fall": " from dense", "retain": " of dense"}


def gate_row(gate: Gate) -> list[Child]:
    """A gate as cells of a row."""
    margin, share, name = gate.margin, gate.share, gate.unit
    of_bound = None if share is None else [" (", number("share", share, share_text(share)), ")"]
    return [
        gate_name(gate.metric, gate.step, gate.what),
        verdict(gate.word, gate.passed),
        bound_text(gate),
        join([number(name, gate.value), _OF_VALUE.get(gate.bound) if gate.value is not None else None]),
        interval(gate.interval, name),
        join([number(name, margin), of_bound]),
    ]


def gate_name(metric: str, step: str, what: str = "") -> Html:
    """The metric that a gate bounds, and the step that measures it."""
    return element("span", breakable(metric), " ", element("span", step, class_="quiet of"), title=what or None)


def bound_text(gate: Gate) -> Html:
    """What a gate demands."""
    limit = None if gate.bound == "must_not_fall" else number(gate.unit, gate.limit)
    return join([gate.demand, limit, gate.sure])


def share_text(share: float) -> str:
    """A signed share in percent, without digits that say nothing."""
    return f"{100 * share:+,.{1 if abs(share) < 1 else 0}f}\N{NO-BREAK SPACE}%"


def measured_section(run: RunView) -> Html:
    """Quality, size and speed, dense beside compressed."""
    measured = measured_of(run)
    if not measured:
        reason = "No step measured anything: there is no `validate` step with a result."
        return section("measured", missing(reason))
    parts: list[Html] = [
        element("p", "Bars begin at zero: ", swatch("bar-dense"), " dense, ", swatch("bar-compressed"), " compressed.")
    ]
    for group in GROUPS:
        some = [one for one in measured if one.group == group]
        both = [one for one in some if one.row.dense is not None]
        alone = [one for one in some if one.row.dense is None]
        if not some and group != MEASURED_ON:
            parts.append(missing(f"{group}: not measured."))
        if both:
            ends = ("interval, 95 % #",) if any(one.interval for one in both) else ()
            rows = [_beside(one, bool(ends)) for one in both]
            parts.append(table(group, (group.lower(), "dense #", "compressed #", "ratio #", *ends, "bars"), rows))
        if alone and group == MEASURED_ON:
            counts = [(_spaced(one.row.name), number(one.row.name, one.row.compressed)) for one in alone]
            parts.append(slim(table(group, ("what", "value #"), counts)))
        elif alone:
            ratios = ("ratio #",) if any(one.row.ratio is not None for one in alone) else ()
            ends = ("interval, 95 % #",) if any(one.interval for one in alone) else ()
            caption = f"{group}, without a number of the dense model beside it"
            rows = [_alone(one, bool(ratios), bool(ends)) for one in alone]
            parts.append(slim(table(caption, (group.lower(), "compressed #", *ratios, *ends), rows)))
    zeros = [note for step in run.steps if (note := zeros_sentence(step))]
    return section("measured", parts, [element("p", note) for note in zeros[-1:]])


def swatch(kind: str) -> Html:
    """A sample of a bar in a text."""
    return element(
        "svg",
        element("rect", class_=kind, x=1, y=1, width=26, height=9),
        width=28,
        height=11,
        class_="swatch",
        aria_hidden="true",
        style="display:inline-block;vertical-align:-1px",
    )


def _beside(one: Measured, with_interval: bool) -> list[Child]:
    row = one.row
    bars = pair_bars(row.name, row.dense, row.compressed) if row.dense is not None else absent()
    return [
        _spaced(row.name),
        number(row.name, row.dense),
        number(row.name, row.compressed),
        number("ratio", row.ratio),
        *([interval(one.interval, row.name)] if with_interval else []),
        bars,
    ]


def _alone(one: Measured, with_ratio: bool, with_interval: bool) -> list[Child]:
    name = one.row.name
    ratio = [number("ratio", one.row.ratio)] if with_ratio else []
    ends = [interval(one.interval, name)] if with_interval else []
    return [_spaced(name), number(name, one.row.compressed), *ratio, *ends]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def zeros_sentence(step: StepView) -> str | None:
    """What the zeros of a step's model are worth."""
    if step.artifact is None or step.artifact.manifest.get("kind") != "model":
        return None
    from orchestrator.zeros import zeros_of

    try:
        return zeros_of(step.artifact)
    except (OrchestratorError, OSError) as error:
        return f"What its zeros are worth cannot be said: {error}"


def curve_section(run: RunView) -> Html:
    """What was recorded along a training or a stream."""
    figures: list[Html] = []
    faults: list[Html] = []
    for step in run.steps:
        found = read_json(step.artifact, CURVES_FILE) if step.artifact else None
        if isinstance(found, Missing):
            faults.append(missing(f"{step.label}: {found.why}."))
        elif found is not None:
            figures += _figures(step, found)
    if not figures and not faults:
        return section("curves", missing("No step recorded a curve: nothing was trained, no stream was read."))
    return section("curves", element("div", figures, class_="charts") if figures else None, faults)


def _figures(step: StepView, found: Any) -> list[Html]:
    """Charts of a step's curves; curves of the same unit share one."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, points in found.items() if isinstance(found, dict) else ():
        pairs = [(point[0], point[1]) for point in points if isinstance(point, list) and len(point) == 2]
        if pairs and all(isinstance(value, int | float) for pair in pairs for value in pair):
            curves[str(name)] = pairs
    axis = "position" if step.stage == "validate" else "update"
    axis = "seed" if curves and all(name.endswith("_by_seed") for name in curves) else axis

    def unit(name: str) -> str:
        return next((word for word in _UNITS if word in name), name)

    figures = []
    for key, group in groupby(sorted(curves, key=lambda name: (unit(name), name)), unit):
        names = list(group)
        for first in range(0, len(names), SERIES):
            some = {name.removesuffix(f"_by_{axis}"): curves[name] for name in names[first : first + SERIES]}
            figures.append(line_chart(f"{step.label}: {key.replace('_', ' ')}", axis, some))
    return figures


def lineage_section(run: RunView) -> Html:
    """The steps with what they took, and their parameters."""
    if not run.steps:
        return section("lineage", missing("The journal names no step."))
    rows = [_step_row(step) for step in run.steps]
    headings = (
        "step",
        "state",
        "fingerprint",
        "artifact",
        "seconds #",
        "predicted #",
        "memory #",
        "predicted #",
        "disk #",
        "predicted #",
    )
    parts: list[Html] = [
        table("Steps, with what they took and what was predicted; of a cached step, its making", headings, rows)
    ]
    for step in run.steps:
        if step.gone:
            parts.append(missing(f"{step.label}: {step.gone}"))
        if step.error:
            parts.append(element("p", step.error, class_="error"))
    parts += [step_details(step) for step in run.steps if step.artifact]
    return section("lineage", parts)


def _step_row(step: StepView) -> list[Child]:
    def pair(name: str) -> list[Child]:
        def one(values: Mapping[str, float]) -> Html | str:
            value = values.get(name)
            text = None if value is None or name != "seconds" else seconds_text(value)
            return number(name, value, text)

        return [one(step.took), one(step.predicted)]

    return [
        f"{step.index + 1}. {step.label}",
        step.state,
        digest(step.fingerprint or None),
        digest(step.digest),
        *pair("seconds"),
        *pair("peak_memory_bytes"),
        *pair("disk_bytes"),
    ]


def step_details(step: StepView) -> Html:
    """Parameters, inputs, invariants and numbers of a step, to be opened."""
    identity = step.identity
    manifest = step.artifact.manifest if step.artifact else {}
    parts: list[Html] = []
    for title, values in (
        ("Parameters", parameters_of(identity)),
        ("Made from", dict(manifest.get("inputs", {}))),
        ("Invariants", dict(manifest.get("invariants", {}))),
    ):
        if values:
            rows = [
                (name, element("code", value_text(value), class_="prose")) for name, value in sorted(values.items())
            ]
            parts.append(table(title, (title.lower(), "value"), rows))
    if step.metrics:
        measured = [(name, number(name, value)) for name, value in sorted(step.metrics.items())]
        parts.append(table("Numbers that the step recorded", ("number", "value #"), measured))
    return folded(f"{step.index + 1}. {step.label}: parameters and numbers", parts)


def parameters_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a step, and what else the specification said of it."""
    values = dict(identity.get("parameters", {}))
    for key in ("skip", "calibrated_on", "device", "seed"):
        if identity.get(key) not in (None, [], ""):
            values[key] = identity[key]
    for key in ("engines", "formats"):
        for one in identity.get(key, ()):
            values[f"{key}: {one['name']}"] = one["parameters"]
    policy = identity.get("policy")
    return values | ({f"policy: {policy['name']}": policy["parameters"]} if policy else {})


def value_text(value: Any) -> str:
    """A parameter as people read it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
