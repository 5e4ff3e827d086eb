"""The table a run ends with: what was measured, dense beside compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DENSE = "dense_"


@dataclass(frozen=True)
class Row:
    """A metric of the compressed model, and of the dense one where that was measured too."""

    name: str
    dense: float | None
    compressed: float


def metric_rows(outcomes: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of the validate steps among a run's steps (as `run --json` has them).

    A metric ``dense_NAME`` stands beside NAME. The last step that measured a name wins.
    """
    measured: dict[str, float] = {}
    for outcome in outcomes:
        if outcome["stage"] == "validate":
            measured |= outcome["metrics"]
    return [
        Row(name, measured.get(DENSE + name), value)
        for name, value in measured.items()
        if not (name.startswith(DENSE) and name.removeprefix(DENSE) in measured)
    ]


def shown(name: str, value: float | None) -> str:
    """A number as people read it; names ending in _bytes or bytes_on_disk get a unit."""
    if value is None:
        return ""
    if "bytes" in name and not name.endswith(("ratio", "per_byte")):
        size = float(value)
        for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
            if size < 1024 or unit == "TiB":
                return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
            size /= 1024
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def as_markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown."""
    lines = ["| metric | dense | compressed |", "|---|---|---|"]
    lines += [f"| {row.name} | {shown(row.name, row.dense)} | {shown(row.name, row.compressed)} |" for row in rows]
    return "\n".join(lines) + "\n"
