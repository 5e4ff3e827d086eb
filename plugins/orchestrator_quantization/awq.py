"""AWQ: multiply the columns of salient inputs before rounding, and clip each group's range; no weight is trained.

Lin et al. 2023, arXiv:2306.00978. Salient inputs are those of large mean |x|. With W' = W diag(s) and x' = x / s the
layer computes what it did (the walk divides whatever produces x), but W' is rounded with less error where it matters:

    s = x_a^alpha                               (eq. 5; `duo_scaling`: / w_a^(1 - alpha), as in the authors' code)
    alpha* = argmin || Q(W diag(s)) (diag(s)^-1 X) - W X ||^2      (eq. 4), alpha on a grid over [0, 1)

for all layers that read x together. x_a is the mean |x|; w_a the mean over rows of |w| / (largest |w| of its group).
Then each group's range is shrunk to the share, down to one half, with the least squared error in the output that the
group contributes (section 4.1 and the authors' `auto_clip`).

Both errors follow from H = X^T X exactly: tr(D H D^T) for the difference D, so no token is run again. Choices: s = 1 is
tried too; the error is the layers' own, not that of the attention they feed; ranges of q and k are shrunk as well.

Shape legend: O = out features, I = in features, G = groups along I, W = width of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from orchestrator.api import InputMoment, LayerResult, Needs, ScalingMethod, Stage, StepError, Work
from orchestrator_quantization.grid import (
    encode,
    fit_grid,
    require_finite,
    require_weight,
    round_to_nearest,
    zero_groups,
)
from orchestrator_quantization.weight_only import WeightOnly

if TYPE_CHECKING:
    import torch

_SMALLEST = 1e-4  # of an activation's or weight's mean size, as in the authors' code
_CLIP_STEPS, _CLIP_SMALLEST = 10, 0.5


class AWQ(WeightOnly, ScalingMethod):
    """Scale salient inputs up in the weight, then round to nearest in clipped ranges."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "awq"
    paper: ClassVar[str] = "arXiv:2306.00978, eq. 4 and 5"
    needs: ClassVar[Needs] = Needs.INPUT_MOMENT

    clip: Literal["none", "mse", "output"] = Field(  # type: ignore[assignment]
        "output", description="Range of a group: its extremes, or the share with the least error in weight or output."
    )
    alphas: int = Field(20, ge=1, le=1000, description="Number of exponents in [0, 1) that are tried.")
    duo_scaling: bool = Field(True, description="Let small weights of an input raise its scale too.")

    def working_bytes(self, rows: int, in_features: int) -> int:
        """Copies of the weight: scaled, rounded, their difference and its product with H."""
        return 24 * rows * in_features

    def effort(self, rows: int, in_features: int) -> Work:
        """One product with H for each exponent, and one with its blocks for each share of a range."""
        weight, width = rows * in_features, self.scheme().group_width(in_features)
        clipped = _CLIP_STEPS * 2.0 * weight * width if self.clip == "output" else 0.0
        return Work(
            operations=2.0 * (self.alphas + 1) * weight * in_features + clipped,
            moved_bytes=60.0 * (self.alphas + 1 + _CLIP_STEPS) * weight,
            calls=30.0 * (self.alphas + _CLIP_STEPS),
        )

    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        """Return s [I] with the least error in the outputs of all layers. Raise `StepError` for unusable numbers."""
        statistic = _usable(statistic)
        hessian_II = statistic.require_hessian()
        best_I, least = None, float("inf")
        for scale_I in self._candidates(weights, statistic):
            error = sum(self._error(weight_OI, scale_I, hessian_II) for weight_OI in weights)
            if error < least:
                best_I, least = scale_I, error
        if best_I is None:
            raise StepError("awq found no scale with a finite error", remedy="check the model and the calibration text")
        return best_I

    def _candidates(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> Iterator[torch.Tensor]:
        import torch

        activation_I = (statistic.sum_abs_I / statistic.num_tokens).clamp(min=_SMALLEST)
        yield torch.ones_like(activation_I)
        weight_I = _mean_size(weights, self.scheme().group_width(len(activation_I)))
        for step in range(self.alphas):
            alpha = step / self.alphas
            scale_I = activation_I**alpha
            if self.duo_scaling:
                scale_I = scale_I / (weight_I ** (1 - alpha) + _SMALLEST)
            scale_I = scale_I.clamp(min=_SMALLEST)
            yield scale_I / (scale_I.max() * scale_I.min()).sqrt()

    def _error(self, weight_OI: torch.Tensor, scale_I: torch.Tensor, hessian_II: torch.Tensor) -> float:
        """The squared error of the output, summed over tokens, when W diag(s) is rounded to nearest."""
        import torch

        encoding = round_to_nearest(weight_OI * scale_I, self.scheme(), self.storage_dtype(), "none")
        delta_OI = encoding.dequantize(torch.float32).div_(scale_I).sub_(weight_OI)
        return float((delta_OI @ hessian_II).mul_(delta_OI).sum())

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the scaled weight rounded in clipped ranges. Raise `StepError` for unusable numbers."""
        import torch

        require_weight(weight_OI, self.storage_dtype())
        statistic = _usable(statistic)
        scheme, (num_out, num_in) = self.scheme(), weight_OI.shape
        width = scheme.group_width(num_in)
        weight_OGW = weight_OI.view(num_out, -1, width)
        hessian_II = statistic.require_hessian() / statistic.num_tokens
        if self.clip == "output":
            blocks_GWW = torch.stack([hessian_II[at : at + width, at : at + width] for at in range(0, num_in, width)])

            def output_error(delta_OGW: torch.Tensor) -> torch.Tensor:
                delta_GOW = delta_OGW.transpose(0, 1)
                return (delta_GOW @ blocks_GWW).mul_(delta_GOW).sum(-1).T

            grid = fit_grid(
                weight_OGW,
                scheme,
                self.storage_dtype(),
                "mse",
                error=output_error,
                steps=_CLIP_STEPS,
                smallest=_CLIP_SMALLEST,
            )
        else:
            grid = fit_grid(weight_OGW, scheme, self.storage_dtype(), self.clip)
        q_OGW, _ = grid.widened().nearest(weight_OGW)
        encoding = encode(q_OGW.view(num_out, num_in), grid)
        rounded_OI = encoding.dequantize(torch.float32)
        delta_OI = weight_OI - rounded_OI
        error = float((delta_OI @ hessian_II).mul_(delta_OI).sum())
        energy = float((weight_OI.square() @ hessian_II.diagonal()).sum())
        metrics = {
            # Mean squared output error per token, and as a share of what inputs without correlation would give.
            "proxy_loss": error,
            "relative_proxy_loss": error / energy if energy > 0 else 0.0,
            "tokens": float(statistic.num_tokens),
            "dead_inputs": float((hessian_II.diagonal() == 0).sum().item()),
            "zero_groups": zero_groups(weight_OI, scheme),
            "zero_fraction": (rounded_OI == 0).float().mean().item(),
        }
        return LayerResult(rounded_OI, encoding, metrics)


def _mean_size(weights: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Return [I] the mean over all rows of |w|, as a share of the largest of its group."""
    import torch

    size_OGW = torch.cat(list(weights)).abs()
    size_OGW = size_OGW.view(len(size_OGW), -1, width)
    largest_OG1 = size_OGW.amax(-1, keepdim=True)
    return (size_OGW / torch.where(largest_OG1 == 0, 1.0, largest_OG1)).mean(0).flatten()


def _usable(statistic: InputMoment | None) -> InputMoment:
    if statistic is None or statistic.num_tokens == 0:
        raise StepError("awq has no calibration tokens for this layer", remedy="calibrate on more text")
    require_finite("H = X^T X", statistic.require_hessian())
    return statistic
