"""Two runs beside each other: what was measured, which gates they met, what differs between their steps.

Both are shown on one scale, dense model included, because two runs need not have started from the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.html_report.charts import error_range, heat_map, pair_bars, scale_bar
from orchestrator.html_report.facts import RunView, StepView
from orchestrator.html_report.findings import (
    GROUPS,
    MEASURED_ON,
    Gate,
    Measured,
    gates_of,
    measured_of,
    verdict_of,
)
from orchestrator.html_report.layer_sections import maps_of
from orchestrator.html_report.layers import LayerMap
from orchestrator.html_report.markup import Child, Html, element
from orchestrator.html_report.page import banner, contents, document, utc
from orchestrator.html_report.sections import bound_text, gate_name, parameters_of, swatch, value_text
from orchestrator.html_report.tables import absent, digest, interval, missing, number, section, slim, table, verdict

MOST_CHANGED = 10


def comparison_page(a: RunView, b: RunView) -> str:
    """Return the page of two runs."""
    parts = (
        ("measured", _measured(a, b)),
        ("gates", _gates(a, b)),
        ("differences", _differences(a, b)),
        ("layers", _layers(a, b)),
        ("steps", _steps(a, b)),
    )
    head = [
        element("h1", "Two runs compared"),
        [_who(letter, run) for letter, run in (("A", a), ("B", b))],
        contents(anchor for anchor, _ in parts),
    ]
    return document(f"{_name(a)} and {_name(b)}", head, [section(anchor, body) for anchor, body in parts])


def _name(run: RunView) -> str:
    return f"{run.title}, {run.run}" if run.run else run.title


def _who(letter: str, run: RunView) -> Html:
    when = [", started ", utc(run.started)] if run.started is not None else None
    return element("div", element("p", element("strong", f"{letter}: "), _name(run), when), banner(_outcome(run)))


def _outcome(run: RunView) -> Any:
    return verdict_of(run, gates_of(run))


def _measured(a: RunView, b: RunView) -> Child:
    mine, other = ({one.row.name: one for one in measured_of(run)} for run in (a, b))
    names = [*mine, *(name for name in other if name not in mine)]
    if not names:
        return missing("Neither run measured anything.")
    parts: list[Child] = [
        element("p", "Bars begin at zero: ", swatch("bar-dense"), " A, ", swatch("bar-compressed"), " B, compressed.")
    ]
    headings = ("dense A #", "dense B #", "A #", "B #", "B / A #", "interval A #", "interval B #", "bars")
    for group in GROUPS:
        rows = [
            _measured_row(name, mine.get(name), other.get(name))
            for name in names
            if next(one for one in (mine.get(name), other.get(name)) if one).group == group
        ]
        if rows:
            named = "what" if group == MEASURED_ON else group.lower()
            parts.append(table(group, *_filled((named, *headings), rows, group), "card pair"))
    return parts


def _filled(
    headings: Sequence[str], rows: Sequence[Sequence[Child]], group: str
) -> tuple[list[str], list[list[Child]]]:
    """The columns in which some row has something; of what is no result, the two values alone."""
    kept = [at for at in range(len(headings)) if any(row[at] != absent() for row in rows)]
    if group == MEASURED_ON:
        kept = [at for at in kept if at == 0 or headings[at] in ("A #", "B #")]
    return [headings[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _measured_row(name: str, a: Measured | None, b: Measured | None) -> list[Child]:
    values = [one.row.compressed if one else None for one in (a, b)]
    ratio = values[1] / values[0] if values[0] and values[1] is not None else None
    both = values[0] is not None and values[1] is not None
    bars = pair_bars(name, values[0], values[1], ("A", "B")) if both else absent()  # type: ignore[arg-type]
    return [
        name.replace("_", " "),
        *(number(name, one.row.dense if one else None) for one in (a, b)),
        *(number(name, value) for value in values),
        number("ratio", ratio),
        *(interval(one.interval if one else None, name) for one in (a, b)),
        bars,
    ]


def _gates(a: RunView, b: RunView) -> Child:
    mine, other = ({(g.step, g.metric, g.bound): g for g in gates_of(run)} for run in (a, b))
    keys = [*mine, *(key for key in other if key not in mine)]
    if not keys:
        return missing("No bounds are recorded of either run.")
    rows = [
        [
            gate_name(key[1], key[0]),
            *_gate(mine.get(key)),
            *_gate(other.get(key)),
        ]
        for key in keys
    ]
    headings = ("gate", "A", "bound of A", "value of A #", "B", "bound of B", "value of B #")
    return table("Every bound of either run", headings, rows, "card pair")


def _gate(gate: Gate | None) -> list[Child]:
    if gate is None:
        return [verdict("no such gate", None), absent(), absent()]
    return [verdict(gate.word, gate.passed), bound_text(gate), number(gate.unit, gate.value)]


def _differences(a: RunView, b: RunView) -> Child:
    rows: list[list[Child]] = []
    for title, before, after in (
        ("source model", a.facts.get("model_digest"), b.facts.get("model_digest")),
        ("specification", a.facts.get("spec"), b.facts.get("spec")),
        ("seed", a.facts.get("seed"), b.facts.get("seed")),
    ):
        if before != after:
            rows.append(["run", title, _said(before), _said(after)])
    for number_, (one, two) in enumerate(paired(a.steps, b.steps), 1):
        label = one.label if one else two.label if two else ""
        if one is None or two is None:
            rows.append([f"{number_}. {label}", "step", *("there" if step else "not there" for step in (one, two))])
            continue
        if one.method != two.method:
            rows.append([f"{number_}. {one.stage}", "method", one.method, two.method])
        mine, other = _decided(one), _decided(two)
        for name in sorted({*mine, *other}):
            if mine.get(name) != other.get(name):
                rows.append([f"{number_}. {label}", name, _said(mine.get(name)), _said(other.get(name))])
    if not rows:
        return element("p", "Nothing that is recorded: the same steps, parameters, sources and versions.")
    return table("Steps, parameters and versions that are not the same", ("where", "what", "A", "B"), rows, "card pair")


def paired(a: Sequence[StepView], b: Sequence[StepView]) -> list[tuple[StepView | None, StepView | None]]:
    """Steps that stand for each other: the first of a stage for the first of that stage, and so on; in A's order."""
    left = list(b)
    pairs: list[tuple[StepView | None, StepView | None]] = []
    for step in a:
        same = [other for other in left if other.stage == step.stage]
        match = next((other for other in same if other.method == step.method), same[0] if same else None)
        if match:
            left.remove(match)
        pairs.append((step, match))
    return [*pairs, *((None, step) for step in left)]


def _decided(step: StepView) -> dict[str, Any]:
    """Everything that decided a step's result, by name."""
    identity = step.identity
    plugin: Mapping[str, Any] = identity.get("plugin", {})
    return {
        **parameters_of(identity),
        **{f"version of {name}": version for name, version in identity.get("environment", {}).items()},
        "version of the plugin": plugin.get("version"),
        "source of the plugin": str(plugin.get("source"))[:12],
        "source of the core": str(identity.get("core"))[:12],
    }


def _said(value: Any) -> Html:
    return absent() if value is None else element("code", value_text(value), class_="prose")


def _layers(a: RunView, b: RunView) -> Child:
    (mine, faults), (other, more_faults) = maps_of(a), maps_of(b)
    by_step = {one.step.index: one for one in other}
    parts: list[Child] = []
    for one, two in paired([m.step for m in mine], [m.step for m in other]):
        if one is None or two is None:
            continue
        first = next(m for m in mine if m.step is one)
        second = by_step[two.index]
        if first.metric is None or first.metric != second.metric:
            parts.append(missing(f"{one.label} and {two.label} do not report the same error of their layers."))
            continue
        parts += _map_pair(first, second)
    parts += [*faults, *more_faults]
    return parts or missing("There are no two steps that reported on their layers.")


def _map_pair(a: LayerMap, b: LayerMap) -> list[Child]:
    limits = error_range([a, b])
    if limits is None:
        return [element("p", f"{a.metric} is zero in every layer of both.")]
    pictures = [
        element("div", element("p", f"{letter}: {one.step.label}"), heat_map(one, *limits))
        for letter, one in (("A", a), ("B", b))
    ]
    metric = str(a.metric)
    changed = [
        (name, a.layers[name][metric], b.layers[name][metric])
        for name in sorted({*a.layers} & {*b.layers})
        if metric in a.layers[name] and metric in b.layers[name] and a.layers[name][metric] > 0
    ]
    changed.sort(key=lambda entry: (-abs(entry[2] / entry[1] - 1), entry[0]))
    rows = [
        (element("code", name), number(metric, one), number(metric, two), number("ratio", two / one))
        for name, one, two in changed[:MOST_CHANGED]
        if one != two
    ]
    same = element("p", "No layer's error differs.")
    listed = (
        slim(table(f"Layers whose {metric} differs most", ("layer", "A #", "B #", "B / A #"), rows)) if rows else same
    )
    heading = element("h3", f"{metric}, on one logarithmic scale")
    return [heading, element("div", pictures, class_="beside"), scale_bar(*limits), listed]


def _steps(a: RunView, b: RunView) -> Child:
    rows: list[list[Child]] = []
    for one, two in paired(a.steps, b.steps):
        label = one.label if one else two.label if two else ""
        cells: list[Child] = [label]
        for step in (one, two):
            took = step.took if step else {}
            cells += [step.state if step else "not there", digest(step.digest if step else None)]
            cells += [number(name, took.get(name)) for name in ("seconds", "peak_memory_bytes", "disk_bytes")]
        rows.append(cells)
    if not rows:
        return missing("Neither journal names a step.")
    columns = ("", "artifact", "seconds #", "memory #", "disk #")
    headings = ("step", *(f"{letter} {column}".strip() for letter in "AB" for column in columns))
    return table("Of a cached step, what its making took", headings, rows, "card pair")
