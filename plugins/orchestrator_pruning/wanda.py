"""Wanda: keep the weights with the largest |weight| x input norm, row by row.

Sun et al. 2023, arXiv:2306.11695, eq. 1: S_ij = |W_ij| * ||X_j||_2, compared within an output row, or within runs
of m inputs for n:m. No weight is updated. It is optimal brain damage with the diagonal of H = X^T X.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.api import InputMoment, LayerResult, Needs, Stage, StepError
from orchestrator_pruning.patterns import Unstructured, choose, require_finite, zero_metrics

if TYPE_CHECKING:
    import torch


class Wanda(Unstructured):
    """Remove the weights with the smallest product of absolute value and input norm."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "arXiv:2306.11695, eq. 1"
    needs: ClassVar[Needs] = Needs.INPUT_NORM

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the weight with zeros in place of the lowest scores. Raise `StepError` for an unusable statistic."""
        if statistic is None or statistic.num_tokens == 0:
            raise StepError("wanda has no calibration tokens for this layer", remedy="calibrate on more text")
        norm_I = statistic.norm_I()
        require_finite("input norms", norm_I)
        pruned_OI = weight_OI.masked_fill(choose(weight_OI, weight_OI.abs() * norm_I, self.pattern, self.sparsity), 0.0)
        loss = ((weight_OI - pruned_OI).square() * statistic.sum_squares_I).sum().item() / statistic.num_tokens
        return LayerResult(
            pruned_OI,
            metrics={
                **zero_metrics(weight_OI, pruned_OI),
                # Squared output error per token, as if input features were uncorrelated.
                "diagonal_proxy_loss": loss,
                "dead_inputs": float((norm_I == 0).sum().item()),
            },
        )
