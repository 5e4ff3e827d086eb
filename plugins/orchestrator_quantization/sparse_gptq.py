"""SparseGPT and GPTQ as one solve: what is removed and what is rounded is made up for by the same columns to come.

Frantar and Alistarh 2023, arXiv:2301.00774, section 3.5: the weights that the mask keeps are rounded in the same pass,
so that the zeros are chosen knowing what rounding did before, and rounding makes up for zeros at once. All zeros are
kept. Choices: the grid of a group is fitted to what the mask leaves of it. One after the other (SparseGPT, then GPTQ
with its zeros frozen) is solved as well, and for each layer the better of the two by the error in its output is kept:
a layer is never worse for it. Of a whole model no such thing follows: what comes behind a layer reads another input
then, and with 2:4 on small models either way has been found to be the better one by some percent of KL. If H cannot be
factored, weights are removed by its diagonal and rounded to nearest (`fallback_rtn`).

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.api import (
    HessianFactor,
    InputMoment,
    Invariant,
    LayerResult,
    LayerShape,
    QuantizedWeight,
    Removal,
    SaliencyMask,
    Work,
    require_own_sparsity,
    solve_columns,
    unfilled_runs,
)
from orchestrator_quantization.column_grids import UpdatedGrids
from orchestrator_quantization.gptq import GPTQ
from orchestrator_quantization.grid import encode
from orchestrator_quantization.rounding import Rounding

if TYPE_CHECKING:
    import torch


class SparseGPTQ(GPTQ):
    """Remove and round weights in one pass, with compensation for both."""

    name: ClassVar[str] = "sparse_gptq"
    paper: ClassVar[str] = "arXiv:2301.00774, section 3.5"
    provides: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID, Invariant.ZEROS})

    act_order: Literal[False] = Field(False, description="Columns are taken in their own order.")
    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Fraction of the weights set to zero; 'n:m' patterns fix it at 1 - n/m."
    )
    pattern: Literal["block", "2:4", "4:8"] = Field(
        "block", description="Where zeros may fall: anywhere in a block of columns, or n kept of every m inputs."
    )
    mask_block_size: int = Field(128, ge=1, description="Columns among which, over all rows, weights compete.")

    @model_validator(mode="after")
    def _sparsity_follows_pattern(self) -> Self:
        require_own_sparsity(self.pattern, self.sparsity)
        return self

    def sparsity_pattern(self) -> str | None:
        """Where the zeros fall; rows may have different numbers of them unless the pattern is n:m."""
        return None if self.pattern == "block" else self.pattern

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        """Refuse groups that do not fill the rows, and runs of m that do not."""
        return unfilled_runs(self.pattern, layer) or super().check_layer(layer)

    def effort(self, rows: int, in_features: int) -> Work:
        """Three passes over the columns."""
        return super().effort(rows, in_features).times(3)

    def compress_together(self, weights: Sequence[torch.Tensor], statistic: InputMoment | None) -> list[LayerResult]:
        """Layer by layer: the weights of one layer compete with each other only."""
        one_by_one = [super(SparseGPTQ, self).compress_together([weight_OI], statistic) for weight_OI in weights]
        return [result for (result,) in one_by_one]

    def _without_factor(self, weight_OI: torch.Tensor, diagonal_I: torch.Tensor) -> QuantizedWeight:
        weight_IO = weight_OI.T.contiguous()
        mask = SaliencyMask(weight_IO, diagonal_I, self.pattern, self.sparsity, self.mask_block_size)
        for start in range(0, len(weight_IO), mask.width):
            mask.choose(start, lambda count, at=start: weight_IO[at : at + count].clone())  # type: ignore[misc]
        return super()._without_factor(weight_OI.masked_fill(mask.zero_IO.T, 0.0), diagonal_I)

    def _solve(self, weight_OI: torch.Tensor, factor: HessianFactor) -> tuple[QuantizedWeight, torch.Tensor]:
        weight_IO = weight_OI.T.contiguous()
        joint, joint_error_O = self._round(weight_IO, weight_IO, factor, self._mask(weight_IO, factor))
        removal = Removal(weight_IO, self._mask(weight_IO, factor), self.mask_block_size)
        solve_columns(weight_IO, factor.unit_lower_II, factor.pivots_I, removal, block_size=self.block_size)
        after, after_error_O = self._round(removal.kept_IO, weight_IO, factor, None)
        better = joint_error_O.sum() <= after_error_O.sum()
        return (joint, joint_error_O) if bool(better) else (after, after_error_O)

    def _mask(self, weight_IO: torch.Tensor, factor: HessianFactor) -> SaliencyMask:
        return SaliencyMask(weight_IO, factor.pivots_I, self.pattern, self.sparsity, self.mask_block_size)

    def _round(
        self, weight_IO: torch.Tensor, original_IO: torch.Tensor, factor: HessianFactor, mask: SaliencyMask | None
    ) -> tuple[QuantizedWeight, torch.Tensor]:
        """Return the rounded weight, and its error per token against the original by row [O]."""
        import torch

        grids = UpdatedGrids(self.scheme(), self.storage_dtype(), self.clip, len(weight_IO))
        rule = Rounding(weight_IO, grids, mask)
        solve_columns(weight_IO, factor.unit_lower_II, factor.pivots_I, rule, block_size=self.block_size)
        encoding = encode(rule.q_IO.T.contiguous(), grids.all())
        delta_OI = original_IO.T - encoding.dequantize(torch.float32)
        loss_O = (delta_OI @ factor.unit_lower_II.T).square_() @ factor.pivots_I.float()
        return encoding, factor.undamped(loss_O, delta_OI.square().sum(1))
