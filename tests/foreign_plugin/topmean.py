"""Top-mean pruning: keep the largest weights of every row, and correct them so that the mean output stays the same.

Removing weights shifts the expected output of a layer by d_o = sum over removed i of w_oi * mu_i, with mu the mean
input. Convolutions put -d into their bias (Nagel et al. 2019, arXiv:1906.04721, section 4.2); the linear layers of
Llama have none, so the kept weights take the smallest change that does the same: w_oi += d_o * mu_i / sum of kept mu^2.

The correction reaches every kept weight, also one that an earlier step had set to zero: the method keeps no mask.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import InputMoment, LayerMethod, LayerResult, Method, Needs, Stage, StepError, hookimpl

if TYPE_CHECKING:
    import torch

ORCHESTRATOR_API = ">=1.0,<2"


class TopMean(LayerMethod):
    """Remove the smallest weights of every row without moving the mean output."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "topmean"
    paper: ClassVar[str] = "Magnitude pruning with the bias correction of arXiv:1906.04721, sec. 4.2, put into weights."
    needs: ClassVar[Needs] = Needs.INPUT_NORM

    sparsity: float = Field(0.5, gt=0, lt=1, description="Fraction of every row that is set to zero.")
    correct: bool = Field(True, description="Correct the kept weights; without it this is magnitude pruning.")

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the pruned and corrected weight. Raise `StepError` if the layer saw no tokens."""
        if statistic is None or statistic.num_tokens == 0:
            raise StepError("topmean has no calibration tokens for this layer", remedy="calibrate on more text")
        count = math.floor(self.sparsity * weight_OI.shape[1])
        smallest_OC = weight_OI.abs().argsort(dim=1, stable=True)[:, :count]
        removed_OI = (weight_OI == 0).fill_(False).scatter(1, smallest_OC, True)
        kept_OI = weight_OI.masked_fill(removed_OI, 0.0)
        mean_I = statistic.sum_I / statistic.num_tokens
        shift_O = (weight_OI - kept_OI) @ mean_I
        if self.correct:
            direction_OI = mean_I.expand_as(weight_OI).masked_fill(removed_OI, 0.0)
            length_O = direction_OI.square().sum(1)
            step_O = (shift_O / length_O).masked_fill(length_O == 0, 0.0)
            kept_OI = kept_OI + step_O.unsqueeze(1) * direction_OI
        return LayerResult(kept_OI.contiguous(), metrics={"max_mean_shift": float(shift_O.abs().max())})


@hookimpl
def register_methods() -> list[type[Method]]:
    """The one method of this plugin."""
    return [TopMean]
