"""The plot of a simulation: what the memory holds under each policy, and how many sequences run over time.

The colours are those of Okabe and Ito, which people with any colour vision can tell apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.errors import PreflightError
from orchestrator.simulation.simulate import SimulationReport

COLOURS = {"paged": "#0072B2", "oracle": "#009E73", "pow2": "#E69F00", "max": "#D55E00"}
DASHES = {"paged": "-", "oracle": "-.", "pow2": "--", "max": ":"}
# Of the parts of memory; waste is lighter than tokens, and hatched where it lies between sequences.
PARTS = (
    ("tokens", "tokens", "#0072B2", ""),
    ("reserved", "reserved for tokens to come", "#56B4E9", ""),
    ("internal", "never filled (internal)", "#E69F00", ""),
    ("external", "between sequences (external)", "#DDDDDD", "////"),
)


def draw(report: SimulationReport, path: Path) -> None:
    """Write an SVG (or a PNG, by the name): one simulation over time. The same report gives the same bytes.

    Raises `PreflightError` if matplotlib is missing.
    """
    figure, (parts, running, waste) = panels()
    bars(parts, report)
    for name in ordered(report):
        points = report.results[name].series
        times = [0.0, *(point.time_s for point in points)]
        middles = [(before + after) / 2 for before, after in pairwise(times)]
        line(running, name, middles, [point.running for point in points])
        line(waste, name, middles, [100 * point.waste for point in points])
    finish(figure, running, waste, "time, s", path)


def draw_sweep(reports: Mapping[float, SimulationReport], path: Path) -> None:
    """Write the same plot against the load: `reports` by arrival rate in requests/s; the bars are of the highest.

    Raises `PreflightError` if matplotlib is missing.
    """
    rates = sorted(reports)
    figure, (parts, running, waste) = panels()
    bars(parts, reports[rates[-1]], f", at {rates[-1]:g} requests/s")
    for name in ordered(reports[rates[-1]]):
        results = [reports[rate].results[name] for rate in rates]
        line(running, name, rates, [result.mean_running for result in results], marker="o")
        line(waste, name, rates, [100 * result.waste.total for result in results], marker="o")
    finish(figure, running, waste, "arrivals, requests/s", path)


def check_plot(path: Path) -> None:
    """Find out before a long simulation whether its plot can be drawn. Raises `PreflightError`."""
    plotting()
    if path.suffix not in (".svg", ".png"):
        raise PreflightError(f"{path.name!r} is no name of a plot", remedy="end it in .svg or .png")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PreflightError(f"{path} cannot be written", remedy="name a file in a folder that is there and is yours")


def ordered(report: SimulationReport) -> list[str]:
    """The policies of a report, the best first."""
    return [name for name in COLOURS if name in report.results]


def panels() -> tuple[Any, Any]:
    """Return a figure and its three axes."""
    figure, axes = plotting().subplots(1, 3, figsize=(12.5, 4.0), width_ratios=(1.2, 1, 1))
    return figure, axes


def plotting() -> Any:
    """Return matplotlib's pyplot, set up so that equal figures are equal bytes. Raises `PreflightError`."""
    try:
        import matplotlib
    except ImportError:
        raise PreflightError(
            "a plot needs matplotlib, which is not installed",
            remedy="pip install 'compression-orchestrator[bench]', or leave the plot out",
        ) from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "simulation"
    matplotlib.rcParams["hatch.linewidth"] = 0.5
    from matplotlib import pyplot

    return pyplot


def bars(axis: Any, report: SimulationReport, when: str = "") -> None:
    """One bar for each policy: what the slots given out hold, in percent, as figure 2 of arXiv:2309.06180."""
    names = ordered(report)
    left = [0.0] * len(names)
    for part, label, colour, hatch in PARTS:
        widths = [100 * getattr(report.results[name].waste, part) for name in names]
        axis.barh(names, widths, left=left, color=colour, label=label, hatch=hatch, edgecolor="white", linewidth=0.8)
        for place, width in enumerate(widths):
            if width >= 9:
                axis.text(
                    left[place] + width / 2,
                    place,
                    f"{width:.1f}",
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0},
                    color="white" if part == "tokens" else "black",
                    ha="center",
                    va="center",
                    fontsize=8,
                )
        left = [one + width for one, width in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_title(f"Memory given out, %{when}", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.09))
    clean(axis)


def line(axis: Any, name: str, x: Sequence[float], y: Sequence[float], marker: str = "") -> None:
    """One policy."""
    style = {"color": COLOURS[name], "linestyle": DASHES[name], "linewidth": 1.6, "marker": marker, "markersize": 4}
    axis.plot(x, y, label=name, **style)


def clean(axis: Any) -> None:
    """No frame, small ticks."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def finish(figure: Any, running: Any, waste: Any, label: str, path: Path) -> None:
    """Titles and scales; then write the figure and forget it."""
    for axis, title in ((running, "Sequences that run at once"), (waste, "Waste, % of the memory given out")):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(label, fontsize=9)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        clean(axis)
    running.legend(fontsize=8, frameon=False)
    waste.set_ylim(0, 100)
    waste.axhline(4, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    waste.annotate("4 %", (1, 4), xycoords=("axes fraction", "data"), va="bottom", ha="right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plotting().close(figure)
