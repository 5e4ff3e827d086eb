"""The table a run ends with: what was measured, dense beside compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DENSE = "dense_"
RATIO = "_ratio"


@dataclass(frozen=True)
class Row:
    """A metric of the compressed model; where they were measured, the dense model's and compressed / dense."""

    name: str
    dense: float | None
    compressed: float
    ratio: float | None


def metric_rows(outcomes: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of the validate steps among a run's steps (as `run --json` has them).

    ``dense_NAME`` and ``NAME_ratio`` stand beside NAME, and of a tier ``NAME_ratio.TIER`` beside ``NAME.TIER``. The
    last step that measured a name wins.
    """
    measured: dict[str, float] = {}
    for outcome in outcomes:
        if outcome["stage"] == "validate":
            measured |= outcome["metrics"]
    beside = {name for name in measured if _base(name) in measured}
    return [
        Row(name, measured.get(DENSE + name), value, measured.get(_ratio_of(name)))
        for name, value in measured.items()
        if name not in beside
    ]


def _base(name: str) -> str | None:
    """The metric beside which this one stands, if it has the name of one that does."""
    if name.startswith(DENSE):
        return name.removeprefix(DENSE)
    metric, dot, tier = name.partition(".")
    return metric.removesuffix(RATIO) + dot + tier if metric.endswith(RATIO) else None


def _ratio_of(name: str) -> str:
    metric, dot, tier = name.partition(".")
    return f"{metric}{RATIO}{dot}{tier}"


def shown(name: str, value: float | None) -> str:
    """A number as people read it; a number of bytes gets a unit, a ratio of two does not."""
    if value is None:
        return ""
    if "bytes" in name and not name.partition(".")[0].endswith(RATIO):
        return size_text(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def size_text(num_bytes: float) -> str:
    """A number of bytes in the unit that people would use."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def foreseen(predicted: Mapping[str, Any]) -> str:
    """What a step is expected to take, as people read it."""
    memory, disk = size_text(predicted["peak_memory_bytes"]), size_text(predicted["disk_bytes"])
    seconds = predicted["seconds"]
    if seconds < 100:
        time = f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    else:
        time = f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
    return f"{memory} of memory, {disk} on disk, {time}"


def as_markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown."""
    lines = ["| metric | dense | compressed | ratio |", "|---|---:|---:|---:|"]
    for row in rows:
        cells = (shown(row.name, row.dense), shown(row.name, row.compressed), shown(RATIO, row.ratio))
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
