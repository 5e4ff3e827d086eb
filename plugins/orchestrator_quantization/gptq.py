"""GPTQ: round column by column; the columns still to come are changed to make up for the error.

Frantar et al. 2022, arXiv:2210.17323, eq. 2-4 and algorithm 1. With H = X^T X / n, damped, and U upper triangular,
U^T U = H^-1:   e_i = (w_i - q_i) / U_ii,   W_{:,j>i} -= e_i U_{i,j}; in the equal form of `orchestrator.columns`.

Choices: input features that never occurred (H_jj = 0) get weight zero, as in the authors' code. If H is not
positive definite, damping is raised tenfold up to five times, then the layer is rounded to nearest; both are
recorded. Zeros of the input (pruned weights) stay exactly zero and their error is propagated, as with the frozen
mask of SparseGPT (arXiv:2301.00774, sec. 3.5). H is factored in float64, the column loop runs in float32.

Shape legend: O = out features, I = in features, G = groups along I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import (
    MAX_RAISES,
    HessianFactor,
    InputMoment,
    LayerResult,
    Needs,
    QuantizedWeight,
    QuantScheme,
    Stage,
    StepError,
    Work,
    in_parallel,
    solve_columns,
)
from orchestrator_quantization.column_grids import StaticGrids, UpdatedGrids
from orchestrator_quantization.grid import encode, require_finite, require_weight, round_to_nearest, zero_groups
from orchestrator_quantization.rounding import Rounding
from orchestrator_quantization.weight_only import WeightOnly

if TYPE_CHECKING:
    import torch

# Rows solved at a time: bounds the memory of wide layers. Fewer beside each other would gain nothing: what takes time
# is the number of operations, not their size.
_ROWS = 8192


class GPTQ(WeightOnly):
    """Round column by column, with compensation through the inverse of H."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "arXiv:2210.17323, algorithm 1"
    needs: ClassVar[Needs] = Needs.INPUT_MOMENT

    block_size: int = Field(32, ge=1, description="Columns that one matrix product feeds back into; speed only.")
    damping: float = Field(0.01, gt=0, le=1, description="Added to the diagonal of H, as a share of its mean.")
    act_order: bool = Field(
        False, description="Quantize columns in order of falling H_jj; scales are then fixed before the first column."
    )

    def scheme(self) -> QuantScheme:
        """The scheme of the result. Columns are stored in their own order, so engines need no index of groups."""
        scheme = super().scheme()
        grouped = scheme.strategy == "group"
        return scheme.model_copy(update={"actorder": "static"}) if self.act_order and grouped else scheme

    def working_bytes(self, rows: int, in_features: int) -> int:
        """The factor of H and what making it takes, or the copies of the weight that the columns are solved on."""
        square, weight = in_features**2, rows * in_features
        # float64 for the decomposition, and the factor twice in float32 while it is turned round; sorting copies H.
        factoring = (20 if self.act_order else 16) * square
        # All layers as one, and with dead inputs zeroed; then columns, errors, zeros and integers of some rows, or
        # the numbers that the integers stand for.
        solving = 8 * weight + max(10 * min(rows, 2 * _ROWS) * in_features, 9 * weight)
        return max(factoring, 4 * square + solving)

    def effort(self, rows: int, in_features: int) -> Work:
        """Factoring H in float64, the loop over columns, and the products that feed errors back."""
        weight = rows * in_features
        return Work(
            operations=2 * in_features**3 / 3 + 3.0 * weight * in_features,
            moved_bytes=120.0 * weight + 60.0 * in_features**2,
            calls=14.0 * in_features * -(-rows // _ROWS),
        )

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the quantized weight and its integers. Raise `StepError` for a weight or an H that is unusable."""
        return self.compress_together([weight_OI], statistic)[0]

    def compress_together(self, weights: Sequence[torch.Tensor], statistic: InputMoment | None) -> list[LayerResult]:
        """Quantize layers that share H as one, since every row is solved for itself."""
        import torch

        for weight_OI in weights:
            require_weight(weight_OI, self.storage_dtype())
        statistic = _usable(statistic)
        factor = statistic.factor(self.damping, "falling" if self.act_order else "given")
        hessian_II, num_tokens = statistic.require_hessian(), statistic.num_tokens
        dead_I = hessian_II.diagonal() == 0
        weight_OI = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        target_OI = weight_OI.masked_fill(dead_I, 0.0) if bool(dead_I.any()) else weight_OI
        facts = {"dead_inputs": float(dead_I.sum().item()), "tokens": float(num_tokens)}
        # Of inputs without correlation: tr(W H W^T) would cost as much as the whole solve.
        energy_O = weight_OI.square() @ hessian_II.diagonal() / num_tokens
        if factor is None:
            encoding = self._without_factor(target_OI, hessian_II.diagonal())
            delta_OI = weight_OI - encoding.dequantize(torch.float32)
            error_O = (delta_OI @ hessian_II).mul_(delta_OI).sum(1) / num_tokens
            facts |= {"fallback_rtn": 1.0, "damping_used": 0.0, "damping_raised": float(MAX_RAISES)}
        else:
            solved = in_parallel([partial(self._solve, rows_OI, factor) for rows_OI in torch.split(target_OI, _ROWS)])
            encoding = _joined([part for part, _ in solved])
            error_O = torch.cat([error_O for _, error_O in solved])
            facts |= {"fallback_rtn": 0.0, "damping_used": factor.damping, "damping_raised": float(factor.num_raised)}
        sizes = [len(weight_OI) for weight_OI in weights]
        parts = zip(
            weights, _split(encoding, sizes), torch.split(error_O, sizes), torch.split(energy_O, sizes), strict=True
        )
        return in_parallel(
            [partial(_result, layer_OI, part, facts, error_O, energy_O) for layer_OI, part, error_O, energy_O in parts]
        )

    def _without_factor(self, weight_OI: torch.Tensor, diagonal_I: torch.Tensor) -> QuantizedWeight:
        """Return what stands for the solve where H is not positive definite even with damping."""
        return round_to_nearest(weight_OI, self.scheme(), self.storage_dtype(), self.clip)

    def _solve(self, weight_OI: torch.Tensor, factor: HessianFactor) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the encoding of some rows, and the error that it makes in the output, per row [O]."""
        import torch

        scheme, dtype = self.scheme(), self.storage_dtype()
        weight_IO = weight_OI.T.contiguous()
        grids: UpdatedGrids | StaticGrids
        if factor.order_I is None:
            grids = UpdatedGrids(scheme, dtype, self.clip, len(weight_IO))
        else:
            weight_IO = weight_IO[factor.order_I]
            grids = StaticGrids(weight_OI, scheme, dtype, self.clip, factor.order_I, self.block_size)
        rule = Rounding(weight_IO, grids)
        solved = solve_columns(weight_IO, factor.unit_lower_II, factor.pivots_I, rule, block_size=self.block_size)
        q_IO = rule.q_IO
        if factor.order_I is not None:
            q_IO = torch.empty_like(q_IO).index_copy_(0, factor.order_I, q_IO)
        return encode(q_IO.T.contiguous(), grids.all()), factor.undamped(solved.loss_O, solved.squares_O)


def _usable(statistic: InputMoment | None) -> InputMoment:
    """Raise `StepError` for a statistic that tells nothing about the inputs."""
    if statistic is None or statistic.num_tokens == 0:
        raise StepError("gptq has no calibration tokens for this layer", remedy="calibrate on more text")
    hessian_II = statistic.require_hessian()
    require_finite("H = X^T X", hessian_II)
    diagonal_I = hessian_II.diagonal()
    if bool((diagonal_I < 0).any()) or not bool((diagonal_I > 0).any()):
        raise StepError(
            "the diagonal of H = X^T X is zero everywhere or negative somewhere: this layer saw no inputs",
            remedy="calibrate on text that reaches this layer, or list the layer under `skip`",
        )
    return statistic


def _result(
    weight_OI: torch.Tensor,
    encoding: QuantizedWeight,
    facts: Mapping[str, float],
    error_O: torch.Tensor,
    energy_O: torch.Tensor,
) -> LayerResult:
    import torch

    quantized_OI = encoding.dequantize(torch.float32)
    error, energy = float(error_O.sum()), float(energy_O.sum())
    metrics = {
        **facts,
        "zero_groups": zero_groups(weight_OI, encoding.scheme),
        # Mean squared output error per token, summed over the outputs; absolute, and as a share of the mean squared
        # output that inputs without correlation would give.
        "proxy_loss": error,
        "relative_proxy_loss": error / energy if energy > 0 else 0.0,
        "zero_fraction": (quantized_OI == 0).float().mean().item(),
    }
    return LayerResult(quantized_OI, encoding, metrics)


def _joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows of one layer after one another."""
    import torch

    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_point_OG for part in parts if part.zero_point_OG is not None]
    return QuantizedWeight(
        torch.cat([part.q_OI for part in parts]),
        torch.cat([part.scale_OG for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        parts[0].scheme,
    )


def _split(whole: QuantizedWeight, sizes: Sequence[int]) -> Iterator[QuantizedWeight]:
    """The layers whose rows were put after one another."""
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        zero_point_OG = None if whole.zero_point_OG is None else whole.zero_point_OG[rows]
        yield QuantizedWeight(whole.q_OI[rows], whole.scale_OG[rows], zero_point_OG, whole.scheme)
        start += size
