"""GPTQ: round column by column; the columns still to come are changed to make up for the error.

Frantar et al. 2022, arXiv:2210.17323, eq. 2-4 and algorithm 1. With H = X^T X / n, damped, and U upper triangular,
U^T U = H^-1:   e_i = (w_i - q_i) / U_ii,   W_{:,j>i} -= e_i U_{i,j}.

Choices: input features that never occurred (H_jj = 0) get weight zero, as in the authors' code. If H is not
positive definite, damping is raised tenfold up to five times, then the layer is rounded to nearest; both are
recorded. Zeros of the input (pruned weights) stay exactly zero and their error is propagated, as with the frozen
mask of SparseGPT (arXiv:2301.00774, sec. 3.5). U is computed in float64, the column loop in float32.

Shape legend: O = out features, I = in features, G = groups along I.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import InputMoment, LayerResult, Needs, QuantizedWeight, QuantScheme, Stage, StepError
from orchestrator_quantization.column_grids import StaticGrids, UpdatedGrids
from orchestrator_quantization.error_propagation import quantize_columns
from orchestrator_quantization.grid import encode, require_finite, require_weight, round_to_nearest
from orchestrator_quantization.inverse_factor import MAX_RAISES, inverse_factor
from orchestrator_quantization.weight_only import WeightOnly

if TYPE_CHECKING:
    import torch


class GPTQ(WeightOnly):
    """Round column by column, with compensation through the inverse of H."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "arXiv:2210.17323, algorithm 1"
    needs: ClassVar[Needs] = Needs.INPUT_MOMENT

    block_size: int = Field(128, ge=1, description="Columns between two updates of the rest; speed only, columns.")
    damping: float = Field(0.01, gt=0, le=1, description="Added to the diagonal of H, as a share of its mean.")
    act_order: bool = Field(
        False, description="Quantize columns in order of falling H_jj; scales are then fixed before the first column."
    )

    def scheme(self) -> QuantScheme:
        """The scheme of the result. Columns are stored in their own order, so engines need no index of groups."""
        scheme = super().scheme()
        grouped = scheme.strategy == "group"
        return scheme.model_copy(update={"actorder": "static"}) if self.act_order and grouped else scheme

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the quantized weight and its integers. Raise `StepError` for a weight or an H that is unusable."""
        import torch

        require_weight(weight_OI, self.storage_dtype())
        hessian_II, num_tokens = _mean_hessian(statistic)
        dead_I = hessian_II.diagonal() == 0
        # Falling H_jj; of equal ones the lower index first.
        order_I = hessian_II.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        factor = inverse_factor(hessian_II if order_I is None else hessian_II[order_I][:, order_I], self.damping)
        target_OI = weight_OI.masked_fill(dead_I, 0.0)
        metrics = {"dead_inputs": float(dead_I.sum().item()), "tokens": float(num_tokens)}
        if factor is None:
            encoding = round_to_nearest(target_OI, self.scheme(), self.storage_dtype(), self.clip)
            metrics |= {"fallback_rtn": 1.0, "damping_used": 0.0, "damping_raised": float(MAX_RAISES)}
        else:
            encoding = self._solve(target_OI, factor.upper_II, order_I)
            metrics |= {"fallback_rtn": 0.0, "damping_used": factor.damping, "damping_raised": float(factor.num_raised)}
        quantized_OI = encoding.dequantize(torch.float32)
        hessian_II = hessian_II.float()
        error = _quadratic(weight_OI - quantized_OI, hessian_II)
        energy = _quadratic(weight_OI, hessian_II)
        # Mean squared output error per token, summed over the outputs; absolute, and as a share of the output.
        metrics |= {"proxy_loss": error, "relative_proxy_loss": error / energy if energy > 0 else 0.0}
        metrics["zero_fraction"] = (quantized_OI == 0).float().mean().item()
        return LayerResult(quantized_OI, encoding, metrics)

    def _solve(self, weight_OI: torch.Tensor, upper_II: torch.Tensor, order_I: torch.Tensor | None) -> QuantizedWeight:
        """Return the encoding; columns are quantized in the order `order_I`, or in their own."""
        import torch

        scheme, dtype = self.scheme(), self.storage_dtype()
        weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
        grids: UpdatedGrids | StaticGrids
        if order_I is None:
            zero_IO = weight_IO == 0
            grids = UpdatedGrids(scheme, dtype, self.clip, zero_IO)
            group_width = scheme.group_width(weight_OI.shape[1])
        else:
            weight_IO = weight_IO[order_I]
            zero_IO = weight_IO == 0
            grids = StaticGrids(weight_OI, scheme, dtype, self.clip, order_I)
            group_width = 1  # blocks need not respect groups
        q_IO = quantize_columns(
            weight_IO,
            upper_II,
            zero_IO if bool(zero_IO.any()) else None,
            grids.of,
            block_size=self.block_size,
            group_width=group_width,
        )
        if order_I is not None:
            q_IO = torch.empty_like(q_IO).index_copy_(0, order_I, q_IO)
        return encode(q_IO.T.contiguous(), grids.all())


def _mean_hessian(statistic: InputMoment | None) -> tuple[torch.Tensor, int]:
    """Return X^T X / n in float64, made exactly symmetric, and n."""
    if statistic is None or statistic.num_tokens == 0:
        raise StepError("gptq has no calibration tokens for this layer", remedy="calibrate on more text")
    require_finite("H = X^T X", statistic.require_hessian())
    hessian_II = statistic.require_hessian().double() / statistic.num_tokens
    hessian_II = (hessian_II + hessian_II.T) / 2
    if bool((hessian_II.diagonal() < 0).any()) or not bool((hessian_II.diagonal() > 0).any()):
        raise StepError(
            "the diagonal of H = X^T X is zero everywhere or negative somewhere: this layer saw no inputs",
            remedy="calibrate on text that reaches this layer, or list the layer under `skip`",
        )
    return hessian_II, statistic.num_tokens


def _quadratic(delta_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """tr(D H D^T)."""
    return float((delta_OI @ hessian_II).mul_(delta_OI).sum().item())
