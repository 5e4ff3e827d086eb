"""Where the zeros may fall, and the choice of the weights with the lowest score.

`row` removes the same share of every output row; `2:4` and `4:8` leave at most n weights in every run of m
neighbouring input features, which is what sparse tensor cores compute with.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.api import (
    Invariant,
    LayerMethod,
    LayerShape,
    StepError,
    lowest,
    require_own_sparsity,
    run_of,
    unfilled_runs,
)

if TYPE_CHECKING:
    import torch

Pattern = Literal["row", "2:4", "4:8"]


class Unstructured(LayerMethod):
    """The parameters that score-based pruning methods share."""

    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS})

    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Fraction of the weights set to zero; 'n:m' patterns fix it at 1 - n/m."
    )
    pattern: Pattern = Field("row", description="Where zeros may fall: anywhere in a row, or n kept of every m inputs.")

    @model_validator(mode="after")
    def _sparsity_follows_pattern(self) -> Self:
        require_own_sparsity(self.pattern, self.sparsity)
        return self

    def sparsity_pattern(self) -> str | None:
        """Where the zeros fall."""
        return self.pattern

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        """Refuse rows that runs of m do not fill, and rows too short for one weight to be removed."""
        if self.pattern == "row" and num_pruned(self.sparsity, layer.in_features) == 0:
            what = f"{self.sparsity} of a row is less than one weight of the in_features {layer.in_features}"
            return "sparsity", what
        return unfilled_runs(self.pattern, layer)


def num_pruned(sparsity: float, num_weights: int) -> int:
    """floor(sparsity * num_weights), not misled by binary fractions: 0.29 of 100 is 29."""
    return math.floor(sparsity * num_weights + 1e-9)


def choose(weight_OI: torch.Tensor, score_OI: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """Mark the weights to remove, [O, I] bool. Weights that are zero already are removed before any other.

    Raises `StepError` for scores that are not finite.
    """
    require_finite("pruning scores", score_OI)
    score_OI = score_OI.masked_fill(weight_OI == 0, -1.0)  # scores are not negative
    run = run_of(pattern)
    if run is None:
        return lowest(score_OI, num_pruned(sparsity, score_OI.shape[1]))
    kept, width = run
    return lowest(score_OI.view(len(score_OI), -1, width), width - kept).flatten(1)


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `StepError` if the tensor holds a NaN or an infinity."""
    num_bad = int((~tensor.isfinite()).sum())
    if num_bad:
        raise StepError(
            f"{num_bad} of {tensor.numel()} {name} are not finite",
            remedy="check the checkpoint and the calibration text for overflow or damage",
        )


def zero_metrics(weight_OI: torch.Tensor, pruned_OI: torch.Tensor) -> Mapping[str, float]:
    """Shares of zeros after and before, and the share of the squared weights that pruning removed."""
    energy = weight_OI.square().sum().item()
    kept = pruned_OI.square().sum().item()
    return {
        "zero_fraction": (pruned_OI == 0).float().mean().item(),
        "zero_fraction_before": (weight_OI == 0).float().mean().item(),
        "relative_weight_error": (energy - kept) / energy if energy else 0.0,
    }
