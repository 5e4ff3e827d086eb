"""Magnitude pruning: remove the smallest weights; needs no data.

Score |w|: the optimal-brain-damage saliency for H = I. Per layer, as in Han et al. 2015 (arXiv:1506.02626), or
per output row, which is the default here: Sun et al. 2023 (arXiv:2306.11695, table 7) find rows the better
comparison group for language models, and every row keeps the same number of weights.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.api import InputMoment, LayerResult, Needs, Stage
from orchestrator_pruning.patterns import Unstructured, choose, zero_metrics

if TYPE_CHECKING:
    import torch


class Magnitude(Unstructured):
    """Remove the weights with the smallest absolute value."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "arXiv:1506.02626"
    needs: ClassVar[Needs] = Needs.WEIGHT

    scope: Literal["row", "layer"] = Field(
        "row", description="Weights that compete: those of one output row, or all of the layer (pattern 'row' only)."
    )

    @model_validator(mode="after")
    def _layer_scope_is_unstructured(self) -> Self:
        if self.scope == "layer" and self.pattern != "row":
            raise ValueError(f"scope 'layer' does not go with pattern {self.pattern}")
        return self

    def sparsity_pattern(self) -> str | None:
        """Where the zeros fall; over a whole layer they keep to no pattern."""
        return super().sparsity_pattern() if self.scope == "row" else None

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the weight with zeros in place of the smallest entries."""
        if self.scope == "layer":
            flat_1I = weight_OI.reshape(1, -1)
            remove_OI = choose(flat_1I, flat_1I.abs(), "row", self.sparsity).view_as(weight_OI)
        else:
            remove_OI = choose(weight_OI, weight_OI.abs(), self.pattern, self.sparsity)
        pruned_OI = weight_OI.masked_fill(remove_OI, 0.0)
        return LayerResult(pruned_OI, metrics=zero_metrics(weight_OI, pruned_OI))
