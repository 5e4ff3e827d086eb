"""The plot of `benchmarks.hybrid`: one panel for each model and budget, one bar for each chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_THREE, _TWO, _ONE = "#1f5f8b", "#7fb2d6", "#c9c9c9"


def draw(found: dict[str, Any], path: Path) -> None:
    """Write an SVG: perplexity of every chain at equal bytes, best first, with the range over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hybrid"  # the same figures, the same bytes
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    panels = [(model, bits) for model, facts in found.items() for bits in facts["budgets"]]
    columns = max(len(facts["budgets"]) for facts in found.values())
    figure, axes = pyplot.subplots(len(found), columns, figsize=(5.2 * columns, 3.1 * len(found)), squeeze=False)
    for axis, (model, bits) in zip(axes.flat, panels, strict=True):
        facts = found[model]
        rows = {label: row for label, row in facts["budgets"][bits].items() if "failed" not in row}
        labels = sorted(rows, key=lambda label: -rows[label]["perplexity"]["mean"])
        for place, label in enumerate(labels):
            value = rows[label]["perplexity"]
            color = {3: _THREE, 2: _TWO, 1: _ONE}[len(label)]
            axis.barh(place, value["mean"], color=color)
            axis.plot([value["lowest"], value["highest"]], [place, place], color="black", linewidth=1)
            axis.text(value["highest"] * 1.02, place, f"{value['mean']:.2f}", va="center", fontsize=8)
        gone = sorted(facts["budgets"][bits].keys() - rows.keys())
        size = max(row["bytes"] for row in rows.values())
        removed = f"{facts['scale']['removed']} of the layers removed"
        title = f"{model}, {size / 2**20:.2f} MiB ({bits} bits, {removed})"
        axis.set_title(title + (f"\ndo not fit: {', '.join(gone)}" if gone else ""), fontsize=9)
        axis.axvline(facts["dense"]["perplexity"], color="black", linestyle=":", linewidth=1)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(facts["dense"]["perplexity"] * 0.9, max(r["perplexity"]["highest"] for r in rows.values()) * 1.5)
        narrow = axis.get_xlim()[1] < 10 * axis.get_xlim()[0]
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7) if narrow else (1, 2, 5)))
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("perplexity, log scale (dotted: dense)", fontsize=8)
        axis.tick_params(axis="x", which="both", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path}")
