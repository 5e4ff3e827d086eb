"""HQQ: choose each group's grid so that most weights lie close to it, whatever the few that do not; needs no data.

Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog. Minimizes || W - s (q - z) ||_p^p with p < 1 by
half-quadratic splitting: with a second variable E for the errors that the norm forgives,

    E = shrink(W - s (q - z)),   shrink(r) = sign(r) relu(|r| - |r|^(p-1) / beta)     (the blog's eq. for W_e)
    z = mean(q - (W - E) / s),   then beta *= kappa,

and q follows from s and z by rounding. Choices, because compressed-tensors stores zero points as integers, where the
authors keep them real: s is solved for too, s = <W - E, q - z> / <q - z, q - z>, z is rounded, and the grid with the
least error as it will be stored is kept for every group, so that none is worse than where it began. Errors are
measured in steps of the grid, so that beta means the same for weights of any size.

Shape legend: O = out features, I = in features, G = groups along I, W = width of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import InputMoment, LayerResult, Needs, Stage, Work
from orchestrator_quantization.grid import Grid, encode, fit_grid, require_weight, zero_groups
from orchestrator_quantization.weight_only import WeightOnly

if TYPE_CHECKING:
    import torch


class HQQ(WeightOnly):
    """Round to a grid that is robust against outliers, found by half-quadratic splitting."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "hqq"
    paper: ClassVar[str] = "Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog"
    needs: ClassVar[Needs] = Needs.WEIGHT

    symmetric: bool = Field(False, description="True: the grid has no zero point. False: one zero point per group.")
    norm: float = Field(0.7, gt=0, lt=1, description="Exponent p of the error that is minimized.")
    iterations: int = Field(20, ge=1, le=1000, description="Most rounds of the splitting.")
    beta: float = Field(10.0, gt=0, le=1e6, description="Weight of the quadratic term at first; larger forgives less.")
    kappa: float = Field(1.01, ge=1, le=10, description="Factor by which beta grows in every round.")

    def working_bytes(self, rows: int, in_features: int) -> int:
        """Copies of the weight: integers, points, differences, forgiven errors, and their powers."""
        return 40 * rows * in_features

    def effort(self, rows: int, in_features: int) -> Work:
        """Passes over the weight, with a power of every difference."""
        weight = rows * in_features
        return Work(moved_bytes=200.0 * self.iterations * weight, calls=40.0 * self.iterations)

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the rounded weight and its integers. Raise `StepError` for weights that are not finite."""
        import torch

        require_weight(weight_OI, self.storage_dtype())
        scheme, (num_out, num_in) = self.scheme(), weight_OI.shape
        weight_OGW = weight_OI.view(num_out, -1, scheme.group_width(num_in))
        start = fit_grid(weight_OGW, scheme, self.storage_dtype(), self.clip)
        grid, shares = self._split(weight_OGW, start)
        q_OGW, _ = grid.widened().nearest(weight_OGW)
        encoding = encode(q_OGW.view(num_out, num_in), grid)
        rounded_OI = encoding.dequantize(torch.float32)
        energy = weight_OI.square().sum().item()
        error = (weight_OI - rounded_OI).square().sum().item()
        metrics = {
            "relative_weight_error": error / energy if energy else 0.0,
            # The norm that is minimized, as a share of what the first grid would give.
            "relative_norm": shares,
            "zero_groups": zero_groups(weight_OI, scheme),
            "zero_fraction": (rounded_OI == 0).float().mean().item(),
        }
        return LayerResult(rounded_OI, encoding, metrics)

    def _split(self, weight_OGW: torch.Tensor, start: Grid) -> tuple[Grid, float]:
        """Return the best grid of each group, and the share of the first one's error that is left."""
        import torch

        scheme, grid, best = start.scheme, start, start
        q_OGW, point_OGW = grid.widened().nearest(weight_OGW)
        least_OG = first_OG = self._errors(weight_OGW, point_OGW)
        beta = self.beta
        for _ in range(self.iterations):
            scale_OG1, zero_OG1 = grid.scale_X.unsqueeze(-1), grid.zero_point_X.unsqueeze(-1)
            steps_OGW = (weight_OGW - point_OGW) / scale_OG1
            forgiven_OGW = steps_OGW.sign() * (steps_OGW.abs() - steps_OGW.abs() ** (self.norm - 1) / beta).relu()
            target_OGW = weight_OGW - forgiven_OGW.nan_to_num(0.0) * scale_OG1
            if not scheme.symmetric:
                zero_OG1 = (q_OGW - target_OGW / scale_OG1).mean(-1, keepdim=True).round()
                zero_OG1 = zero_OG1.clamp(scheme.quant_min, scheme.quant_max)
            level_OGW = q_OGW - zero_OG1
            energy_OG = level_OGW.square().sum(-1)
            scale_OG = (target_OGW * level_OGW).sum(-1) / energy_OG
            scale_OG = scale_OG.to(grid.dtype).float()
            scale_OG = torch.where((energy_OG > 0) & (scale_OG > 0) & scale_OG.isfinite(), scale_OG, grid.scale_X)
            grid = Grid(scale_OG, zero_OG1.squeeze(-1), scheme, grid.dtype)
            q_OGW, point_OGW = grid.widened().nearest(weight_OGW)
            error_OG = self._errors(weight_OGW, point_OGW)
            better_OG = error_OG < least_OG
            if not bool(better_OG.any()):
                break
            least_OG = torch.where(better_OG, error_OG, least_OG)
            best = Grid(
                torch.where(better_OG, grid.scale_X, best.scale_X),
                torch.where(better_OG, grid.zero_point_X, best.zero_point_X),
                scheme,
                grid.dtype,
            )
            beta *= self.kappa
        total = float(first_OG.sum())
        return best, float(least_OG.sum()) / total if total > 0 else 1.0

    def _errors(self, weight_OGW: torch.Tensor, point_OGW: torch.Tensor) -> torch.Tensor:
        """Return sum |difference|^p of each group [O, G]."""
        return (weight_OGW - point_OGW).abs().pow(self.norm).sum(-1)
