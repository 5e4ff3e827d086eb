"""N:M patterns: at most N weights that are not zero in every run of M neighbouring input features. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.checkpoint import LayerShape


def run_of(pattern: str) -> tuple[int, int] | None:
    """Return (N, M) of a pattern like "2:4"; None for one of another kind ("row", "block")."""
    kept, colon, width = pattern.partition(":")
    return (int(kept), int(width)) if colon else None


def require_own_sparsity(pattern: str, sparsity: float) -> None:
    """Raise `ValueError`, as validators do, if an N:M pattern is given with a share of zeros that is not its own."""
    run = run_of(pattern)
    if run is not None and sparsity != 1 - run[0] / run[1]:
        raise ValueError(f"pattern {pattern} fixes sparsity at {1 - run[0] / run[1]}, not {sparsity}")


def unfilled_runs(pattern: str, layer: LayerShape) -> tuple[str, str] | None:
    """Return what `LayerMethod.check_layer` returns if the runs of an N:M pattern do not fill the layer's rows."""
    run = run_of(pattern)
    if run is not None and layer.in_features % run[1]:
        return "pattern", f"{run[1]} does not divide in_features {layer.in_features}"
    return None
