"""Charts as SVG, drawn by hand: bars, lines, and a map of layers. No script, no font, nothing from elsewhere.

Every chart says in its label what it shows, and its numbers stand in a table or in titles beside it. Lengths are in
pixels of the drawing; it is scaled down where the screen is narrower.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from orchestrator.html_report.layers import TROUBLES, LayerCell, LayerMap
from orchestrator.html_report.markup import Html, element, join
from orchestrator.html_report.palette import DASHES, LEVELS
from orchestrator.report import shown

MOST_POINTS = 400  # drawn of a curve: more than a chart has pixels to tell apart
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 520, 220, 64, 34, 10
_CELL_MIN, _CELL_MAX = 11, 30
_BAND, _BANDS = 220, 4  # a band and its roles fit a phone, four bands and the roles once a desk
_DECADES = 2
_ROW_MIN = 15  # lines of text must not overlap
_MOST_LETTERS, _LETTER = 22, 6.0  # of a role, and the width of one
_NUMBER = 28  # room for the number of a block
# Marks in the cells of the map: what happened beats what is large, so it has a shape.
_MARKS: Mapping[str, str] = {
    "unseen_experts": "square",
    "starved_experts": "square",
    "fallback_rtn": "cross",
    "fallback_diagonal": "cross",
    "damping_raised": "triangle",
    "dead_inputs": "dot",
}


def pair_bars(name: str, dense: float, compressed: float, labels: tuple[str, str] = ("dense", "compressed")) -> Html:
    """Two bars from zero, the second one hatched; the numbers stand in the row that they are in."""
    most = max(dense, compressed, 0.0)
    label = f"{name}: {labels[0]} {shown(name, dense)}, {labels[1]} {shown(name, compressed)}"
    bars = [
        element("rect", class_=kind, x=0, y=y, width=_round(150 * max(value, 0.0) / most if most else 0), height=8)
        for kind, y, value in (("bar-dense", 2, dense), ("bar-compressed", 13, compressed))
    ]
    return element(
        "svg",
        bars,
        element("line", class_="axis", x1=0, y1=0, x2=0, y2=23),
        class_="bars",
        viewBox="0 0 152 23",
        width=152,
        height=23,
        role="img",
        aria_label=label,
    )


def line_chart(title: str, axis: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Html:
    """Lines over one axis, told apart by dashes and shapes of a legend as well as by colour."""
    drawn = {name: thinned(points) for name, points in curves.items()}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    unit = 1024.0 ** max(0, int(math.log(max(ys), 1024))) if "bytes" in title and max(ys) >= 1 else 1.0
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = [tick * unit for tick in ticks(min(ys) / unit, max(ys) / unit)]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))

    def at(x: float, y: float) -> tuple[str, str]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return _round(_LEFT + across * (_WIDTH - _LEFT - 12)), _round(
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)
        )

    grid: list[Html] = []
    for tick in y_ticks:
        _, y = at(x0, tick)
        grid.append(element("line", class_="grid", x1=_LEFT, y1=y, x2=_WIDTH - 12, y2=y))
        grid.append(element("text", shown(title, tick), x=_LEFT - 6, y=y, dy="0.32em", text_anchor="end"))
    for tick in x_ticks:
        if x0 <= tick <= x1:
            x, _ = at(tick, y0)
            grid.append(element("line", class_="axis", x1=x, y1=_HEIGHT - _BOTTOM, x2=x, y2=_HEIGHT - _BOTTOM + 4))
            grid.append(element("text", shown(axis, tick), x=x, y=_HEIGHT - _BOTTOM + 16, text_anchor="middle"))
    bottom = _HEIGHT - _BOTTOM
    grid.append(element("line", class_="axis", x1=_LEFT, y1=bottom, x2=_WIDTH - 12, y2=bottom))
    grid.append(element("text", axis, x=(_LEFT + _WIDTH) // 2, y=_HEIGHT - 2, text_anchor="middle", class_="quiet"))
    lines = []
    for number, points in enumerate(drawn.values()):
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        lines.append(
            element("polyline", points=path, class_=f"curve s{number}", stroke_dasharray=DASHES[number] or None)
            if len(places) > 1
            else element("circle", cx=places[0][0], cy=places[0][1], r=3, class_=f"dot s{number}")
        )
    ends = "; ".join(f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in curves.items())
    figure = element(
        "svg",
        grid,
        lines,
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} by {axis}: {ends}",
    )
    legend = [
        element("li", line_sample(number), element("span", name.replace("_", " "))) for number, name in enumerate(drawn)
    ]
    return element("figure", element("figcaption", title), figure, element("ul", legend, class_="legend"))


def line_sample(number: int) -> Html:
    """A short piece of a line as it is drawn in a chart."""
    line = element("line", x1=0, y1=5, x2=28, y2=5, class_=f"curve s{number}", stroke_dasharray=DASHES[number] or None)
    return element("svg", line, width=28, height=10, aria_hidden="true")


def heat_map(layers: LayerMap, low: float, high: float) -> Html:
    """Blocks across, roles down; the colour is the error on a logarithmic scale, a mark is what went wrong.

    The blocks come in bands as wide as a phone, each with the roles before it. On a wide screen `_BANDS` of them stand
    side by side without a seam, and the first alone shows the roles; elsewhere they stand one below the other.
    """
    count = len(layers.blocks)
    per_band = max(_BAND // _CELL_MAX, min(_BAND // _CELL_MIN, -(-count // _BANDS)))
    size = min(_CELL_MAX, _BAND // per_band)
    bands = [
        element("div", _roles(layers, max(size, _ROW_MIN)), _band(layers, blocks, size, (low, high)), class_="band")
        for blocks in (layers.blocks[first : first + per_band] for first in range(0, count, per_band))
    ]
    label = (
        f"{layers.step.label}: {layers.metric or 'no error reported'} of {len(layers.layers)} layers"
        f" in {count} blocks; the worst are listed below"
    )
    return element("div", bands, class_="map", role="img", aria_label=label)


def _roles(layers: LayerMap, row_height: int) -> Html:
    """The names of the rows of a band."""
    short = [role if len(role) <= _MOST_LETTERS else f"…{role[1 - _MOST_LETTERS :]}" for role in layers.roles]
    width = 6 + round(_LETTER * max((len(role) for role in [*short, "block"]), default=0))
    height = row_height * len(short) + 24
    names = [
        element("text", name, x=width - 6, y=row * row_height + row_height // 2, dy="0.35em", text_anchor="end")
        for row, name in enumerate(short)
    ]
    names.append(element("text", "block", x=width - 13, y=height - 8, text_anchor="end", class_="quiet"))
    return _picture("roles", names, width, height)


def _band(layers: LayerMap, blocks: Sequence[int], size: int, limits: tuple[float, float]) -> Html:
    """The cells of some blocks, and the numbers of these below."""
    row_height = max(size, _ROW_MIN)
    width, height = size * len(blocks), row_height * len(layers.roles) + 24
    parts: list[Html] = []
    for row, role in enumerate(layers.roles):
        for column, block in enumerate(blocks):
            cell = layers.cells.get((block, role))
            if cell:
                level = level_of(cell.error, *limits)
                parts.append(_cell(cell, level, column * size, row * row_height, (size, row_height)))
    every = next(step for step in (1, 2, 5, 10) if step * size >= _NUMBER)
    for column, block in enumerate(blocks):
        if block % every == 0 or block < 0:
            text, x = (str(block) if block >= 0 else "-"), column * size + size // 2
            parts.append(element("text", text, x=x, y=height - 8, text_anchor="middle", class_="quiet"))
    return _picture("heat", parts, width, height)


def _picture(class_: str, parts: Sequence[Html], width: int, height: int) -> Html:
    """A part of the map, which as a whole has a label."""
    size = f"0 0 {width} {height}"
    return element("svg", parts, class_=class_, viewBox=size, width=width, height=height, aria_hidden="true")


def block_name(block: int) -> str:
    """A block by its number; layers outside of blocks have -1."""
    return f"block {block}" if block >= 0 else "outside of blocks"


def _cell(cell: LayerCell, level: int | None, x: int, y: int, size: tuple[int, int]) -> Html:
    error = "no error reported" if cell.error is None else f"{cell.error:.4g}"
    worst = f" (worst of {cell.count}: {cell.worst})" if cell.count > 1 else ""
    troubles = "".join(f"; {TROUBLES[name]}: {total:g}" for name, total in cell.troubles.items())
    title = element("title", f"{block_name(cell.block)}, {cell.role}: {error}{worst}{troubles}")
    square = element(
        "rect", title, x=x, y=y, width=size[0] - 1, height=size[1] - 1, class_=f"h{'x' if level is None else level}"
    )
    mark = next((_MARKS[name] for name in cell.troubles if name in _MARKS), None)
    side = min(size)
    place = (x, y + (size[1] - side) // 2)
    return join([square, mark_shape(mark, *place, side, f"m{'x' if level is None else level}") if mark else None])


def mark_shape(shape: str, x: int, y: int, size: int, class_: str) -> Html:
    """A mark in the cell at x, y; it lets the pointer through to the title of the cell."""
    path = {
        "dot": "M8.5 5.5a3 3 0 1 0 .01 0z",
        "cross": "M4 4l9 9m0-9l-9 9",
        "triangle": "M8.5 4l5 9h-10z",
        "square": "M5 5h7v7h-7z",
    }[shape]
    return element("path", d=path, class_=f"mark {class_}", transform=f"translate({x} {y}) scale({size / 18:.2f})")


def scale_bar(low: float, high: float) -> Html:
    """The colours of the map with the errors where each begins."""
    parts = []
    for level in range(LEVELS):
        start = math.exp(math.log(low) + (math.log(high) - math.log(low)) / LEVELS * level)
        parts.append(element("rect", x=level * 56, y=0, width=55, height=12, class_=f"h{level}"))
        if high > low or level == 0:
            parts.append(element("text", f"{start:.2g}", x=level * 56, y=25, class_="quiet"))
    label = f"colour scale, logarithmic, from {low:.2g} to {high:.2g}"
    return element("svg", parts, viewBox=f"0 0 {LEVELS * 56} 30", class_="scale", role="img", aria_label=label)


def level_of(error: float | None, low: float, high: float) -> int | None:
    """The colour of an error, 0 to `LEVELS` - 1, on a logarithmic scale from low to high; None without an error."""
    if error is None:
        return None
    if error <= low or high <= low:
        return 0
    return min(LEVELS - 1, int(LEVELS * (math.log(error) - math.log(low)) / (math.log(high) - math.log(low))))


def error_range(maps: Sequence[LayerMap]) -> tuple[float, float] | None:
    """The ends of a scale for the errors above zero, of maps that share it; None if there are none.

    They are at least `_DECADES` apart: layers that hardly differ shall not look as if they did.
    """
    found = [cell.error for one in maps for cell in one.cells.values() if cell.error is not None and cell.error > 0]
    if not found:
        return None
    low, high = math.log10(min(found)), math.log10(max(found))
    beyond = (_DECADES - (high - low)) / 2
    if beyond <= 0:
        return min(found), max(found)
    ends = max(low - beyond, sys.float_info.min_10_exp), min(high + beyond, sys.float_info.max_10_exp)
    return 10.0 ** ends[0], 10.0 ** ends[1]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` + 1 points, evenly taken, the last one among them."""
    every = max(1, -(-len(points) // MOST_POINTS))
    kept = list(points[::every])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from about low to about high: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
