"""The sections of the page about layers: a map of errors, the worst by name, and what did not go as it should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.html_report.charts import block_name, error_range, heat_map, mark_shape, scale_bar
from orchestrator.html_report.facts import LAYERS_FILE, Missing, RunView
from orchestrator.html_report.layers import TROUBLES, LayerMap, layer_map, natural, troubles_of
from orchestrator.html_report.markup import Html, element, join
from orchestrator.html_report.tables import absent, breakable, folded, missing, more, number, section, slim, table

MOST_NAMED = 100  # layers of one kind of trouble
MOST_WORST = 8
MOST_LAYERS = 1000  # in a list
_OF_BLOCK = ("block", "mean #", "largest #", "of layer")


def layer_section(run: RunView) -> Html:
    """The error of every layer as a map, and the worst by name."""
    maps, faults = maps_of(run)
    parts: list[Html] = []
    with_error = [one for one in maps if one.metric]
    if with_error:
        parts += [legend_of_marks(with_error)]
    for one in maps:
        parts.append(element("h3", one.step.label))
        parts += map_parts(one) if one.metric else [missing("The method reports no error of its layers.")]
    parts += faults
    if not parts:
        parts.append(missing("No step compressed layer by layer with a result, so there is no error of each layer."))
    return section("layers", parts)


def maps_of(run: RunView) -> tuple[list[LayerMap], list[Html]]:
    """The maps of a run's steps, and sentences for those that cannot be read."""
    maps, faults = [], []
    for step in run.steps:
        found = layer_map(step)
        if isinstance(found, Missing):
            faults.append(missing(f"{step.label}: {found.why}."))
        elif found is not None and found.layers:
            maps.append(found)
    return maps, faults


def map_parts(one: LayerMap, limits: tuple[float, float] | None = None) -> list[Html]:
    """A map with its scale, the worst layers and the mean of each block."""
    limits = limits or error_range([one])
    if limits is None:
        return [element("p", f"{one.metric} of all {len(one.layers)} layers is zero.")]
    kind = "the share of the output's energy that was lost" if "proxy" in str(one.metric) else "relative to the weights"
    worst = [(element("code", breakable(name)), number("error", value)) for name, value in one.worst(MOST_WORST)]
    blocks = [
        (block_name(block), number("error", mean), number("error", most), element("code", breakable(name)))
        for block, (mean, most, name) in one.of_blocks().items()
    ]
    every = [
        (element("code", breakable(name)), number("error", values.get(str(one.metric))), _marks(values))
        for name, values in sorted(one.layers.items(), key=lambda pair: natural(pair[0]))
    ]
    columns = ("layer", f"{one.metric} #", "what happened")
    return [
        element("p", f"{one.metric}, {kind}; logarithmic. Numbers: under the mouse, and in the lists below."),
        heat_map(one, *limits),
        scale_bar(*limits),
        slim(table(f"The {len(worst)} layers with the largest {one.metric}", ("layer", f"{one.metric} #"), worst)),
        folded("Each block", slim(table("Mean and largest of each block", _OF_BLOCK, blocks))),
        folded(f"All {len(every):,} layers", slim(table("Every layer", columns, every)))
        if len(every) <= MOST_LAYERS
        else missing(f"{len(every):,} layers are too many to list; {LAYERS_FILE} of the artifact has them."),
    ]


def _marks(values: Mapping[str, float]) -> Html:
    happened = "; ".join(f"{TROUBLES[name]}: {values[name]:g}" for name in TROUBLES if values.get(name))
    return element("span", happened, class_="prose") if happened else absent()


def legend_of_marks(maps: Sequence[LayerMap]) -> Html:
    """What the shapes in the cells mean, of those that occur; a sentence if none does."""
    present = {name for one in maps for cell in one.cells.values() for name in cell.troubles}
    shapes = (
        ("square", ("unseen_experts", "starved_experts"), "starved expert"),
        ("cross", ("fallback_rtn", "fallback_diagonal"), "fell back"),
        ("triangle", ("damping_raised",), "damping raised"),
        ("dot", ("dead_inputs",), "dead inputs"),
    )
    items = [
        element(
            "li", element("svg", mark_shape(shape, 0, 0, 18, "mx"), width=17, height=17, aria_hidden="true"), meaning
        )
        for shape, names, meaning in shapes
        if present.intersection(names)
    ]
    if not items:
        return element("p", "No layer is marked: none was damped more, dead, starved, or fell back.")
    return element("ul", items, class_="legend")


def _names(layers: Sequence[str]) -> Html:
    return join([*([breakable(name), " "] for name in layers[:MOST_NAMED]), more(len(layers) - MOST_NAMED)])


def trouble_section(run: RunView) -> Html:
    """What was damped, dead or fell back, by step."""
    maps, _ = maps_of(run)
    if not maps:
        return section("troubles", missing("No step reported on its layers."))
    troubles = troubles_of(maps)
    if not troubles:
        total = sum(len(one.layers) for one in maps)
        sentence = (
            f"None of {total} layers, counted once a step: no damping was raised, no input was dead, none fell back."
        )
        return section("troubles", element("p", sentence))
    rows = [
        (
            TROUBLES[one.metric],
            one.step,
            number(one.metric, one.total, f"{one.total:,g}"),
            folded(f"{len(one.layers)} of {one.of}", element("span", _names(one.layers), class_="prose")),
        )
        for one in troubles
    ]
    return section("troubles", table("By step", ("what", "step", "in all #", "layers"), rows))
