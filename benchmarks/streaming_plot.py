"""The plot of `benchmarks.streaming`: perplexity along the stream, one panel for each model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart; with line styles, so that print does too.
STYLES: dict[str, tuple[str, Any]] = {
    "contiguous": ("#D55E00", "-"),
    "h2o, a fifth": ("#CC79A7", "-"),
    "kivi, 2 bits": ("#E69F00", "-."),
    "streaming_llm": ("#0072B2", "-"),
    "streaming_llm, a fifth": ("#56B4E9", "-"),
    "window": ("#009E73", (0, (2, 3))),  # last, and with gaps: where it is as good as streaming_llm, both are seen
}
POINTS_PER_WINDOW, COLUMNS = 2, 2


TITLES = {"quickstart-sink": "quickstart with an attention sink built in"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Write an SVG: perplexity by position, log scale, x in trained windows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "streaming"  # the same figures, the same bytes
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    rows_of_panels = -(-len(found) // COLUMNS)
    size = (5.2 * min(len(found), COLUMNS), 3.3 * rows_of_panels + 0.7)
    figure, axes = pyplot.subplots(rows_of_panels, min(len(found), COLUMNS), figsize=size, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (model, facts) in zip(axes.flat, found.items(), strict=False):
        rows = {name: row for name, row in facts["policies"].items() if "failed" not in row}
        window = facts["window_tokens"]
        recomputed = facts["recomputed_perplexity"]
        x = [(point + 0.5) / POINTS_PER_WINDOW for point in range(len(recomputed))]
        axis.plot(x, recomputed, color="#999999", linewidth=4, alpha=0.6, label="no cache, window recomputed")
        for name, (color, line) in STYLES.items():
            if name in rows:
                axis.plot(
                    x, rows[name]["curves"]["stream_perplexity"], color=color, linestyle=line, linewidth=1.6, label=name
                )
        axis.axvline(1, color="black", linestyle=":", linewidth=1)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(0, None)
        axis.set_xlabel(f"position in the stream, trained windows of {window} tokens", fontsize=8)
        axis.set_title(TITLES.get(model, model), fontsize=10)
        axis.set_ylabel("perplexity, log scale", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.55 / size[1], 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path}")
