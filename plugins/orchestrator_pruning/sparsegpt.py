"""SparseGPT: remove weights block of columns by block of columns; what is left makes up for the error.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. With the damped H = X^T X / n and U upper triangular,
U^T U = H^-1, a weight's saliency is w_i^2 / U_ii^2 (eq. 4); removing it adds -w_i / U_ii * U_{i,j} to the columns j > i
of its row. In every block of columns the share `sparsity` with the lowest saliency goes, over all rows together; for
n:m patterns, n of the m columns that come next. Saliencies are those of the weights as updated by then.

Run in the equal form of `orchestrator.columns`, as is GPTQ.

Choices: weights that are zero already go first and stay zero; input features that never occurred get weight zero. If H
is not positive definite, damping is raised tenfold up to five times; then weights are removed by the diagonal of H and
none is updated, which is recorded (`fallback_diagonal`).

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.api import (
    HessianFactor,
    InputMoment,
    Invariant,
    LayerMethod,
    LayerResult,
    LayerShape,
    Needs,
    Removal,
    SaliencyMask,
    Stage,
    StepError,
    Work,
    require_own_sparsity,
    run_of,
    solve_columns,
    unfilled_runs,
)
from orchestrator_pruning.patterns import num_pruned, require_finite, zero_metrics

if TYPE_CHECKING:
    import torch

_FEEDBACK = 32  # columns that one product feeds back into; speed only


class SparseGPT(LayerMethod):
    """Remove weights by second-order saliency, and let the columns still to come make up for it."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "sparsegpt"
    paper: ClassVar[str] = "arXiv:2301.00774, algorithm 1"
    needs: ClassVar[Needs] = Needs.INPUT_MOMENT
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS})

    sparsity: float = Field(
        0.5, gt=0, lt=1, description="Fraction of the weights set to zero; 'n:m' patterns fix it at 1 - n/m."
    )
    pattern: Literal["block", "2:4", "4:8"] = Field(
        "block", description="Where zeros may fall: anywhere in a block of columns, or n kept of every m inputs."
    )
    block_size: int = Field(128, ge=1, description="Columns among which, over all rows, weights compete.")
    damping: float = Field(0.01, gt=0, le=1, description="Added to the diagonal of H, as a share of its mean.")

    @model_validator(mode="after")
    def _sparsity_follows_pattern(self) -> Self:
        require_own_sparsity(self.pattern, self.sparsity)
        run = run_of(self.pattern)
        if run is not None and self.block_size % run[1]:
            raise ValueError(f"block_size {self.block_size} is no multiple of the {run[1]} of pattern {self.pattern}")
        return self

    def sparsity_pattern(self) -> str | None:
        """Where the zeros fall; rows may have different numbers of them unless the pattern is n:m."""
        return None if self.pattern == "block" else self.pattern

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        """Refuse rows that runs of m do not fill, and blocks too small for one weight to be removed."""
        if self.pattern == "block":
            smallest = layer.out_features * min(self.block_size, layer.in_features % self.block_size or self.block_size)
            if num_pruned(self.sparsity, smallest) == 0:
                return "sparsity", f"{self.sparsity} of a block of {smallest} weights is less than one weight"
        return unfilled_runs(self.pattern, layer)

    def working_bytes(self, rows: int, in_features: int) -> int:
        """Factoring H in float64, or the factor and the copies of the weight that the columns are solved on."""
        square, weight = in_features**2, rows * in_features
        return max(16 * square, 4 * square + 20 * weight)

    def effort(self, rows: int, in_features: int) -> Work:
        """Factoring H in float64, the loop over columns, and the products that feed errors back."""
        weight = rows * in_features
        return Work(
            operations=2 * in_features**3 / 3 + 3.0 * weight * in_features,
            moved_bytes=80.0 * weight + 60.0 * in_features**2,
            calls=8.0 * in_features,
        )

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the pruned and updated weight. Raise `StepError` for a weight or an H that is unusable."""
        if statistic is None or statistic.num_tokens == 0:
            raise StepError("sparsegpt has no calibration tokens for this layer", remedy="calibrate on more text")
        hessian_II = statistic.require_hessian()
        diagonal_I = hessian_II.diagonal() / statistic.num_tokens
        require_finite("weights", weight_OI)
        require_finite("entries of H = X^T X", hessian_II)
        if not bool((diagonal_I > 0).any()) or bool((diagonal_I < 0).any()):
            raise StepError(
                "the diagonal of H = X^T X is zero everywhere or negative somewhere: this layer saw no inputs",
                remedy="calibrate on text that reaches this layer, or list the layer under `skip`",
            )
        factor = statistic.factor(self.damping, "given")
        dead_I = diagonal_I == 0
        target_IO = weight_OI.T.contiguous().masked_fill_(dead_I[:, None], 0.0)
        if factor is None:
            pruned_IO, loss = self._by_diagonal(target_IO, diagonal_I)
            facts = {"fallback_diagonal": 1.0, "damping_used": 0.0}
        else:
            pruned_IO, loss = self._solve(target_IO, factor)
            facts = {
                "fallback_diagonal": 0.0,
                "damping_used": factor.damping,
                "damping_raised": float(factor.num_raised),
            }
        pruned_OI = pruned_IO.T.contiguous()
        energy = float((weight_OI.double().square() @ diagonal_I.double()).sum())
        return LayerResult(
            pruned_OI,
            metrics={
                **zero_metrics(weight_OI, pruned_OI),
                **facts,
                "dead_inputs": float(dead_I.sum().item()),
                "tokens": float(statistic.num_tokens),
                # Mean squared output error per token, and as a share of what inputs without correlation would give.
                "proxy_loss": loss,
                "relative_proxy_loss": loss / energy if energy > 0 else 0.0,
            },
        )

    def _solve(self, weight_IO: torch.Tensor, factor: HessianFactor) -> tuple[torch.Tensor, float]:
        """Return the pruned weight [I, O], and the squared error per token that it makes in the output."""
        mask = SaliencyMask(weight_IO, factor.pivots_I, self.pattern, self.sparsity, self.block_size)
        rule = Removal(weight_IO, mask, self.block_size)
        solved = solve_columns(weight_IO, factor.unit_lower_II, factor.pivots_I, rule, block_size=_FEEDBACK)
        return rule.kept_IO, float(factor.undamped(solved.loss_O, solved.squares_O).sum())

    def _by_diagonal(self, weight_IO: torch.Tensor, diagonal_I: torch.Tensor) -> tuple[torch.Tensor, float]:
        mask = SaliencyMask(weight_IO, diagonal_I, self.pattern, self.sparsity, self.block_size)
        for start in range(0, len(weight_IO), mask.width):
            mask.choose(start, lambda count, at=start: weight_IO[at : at + count].clone())  # type: ignore[misc]
        pruned_IO = weight_IO.masked_fill(mask.zero_IO, 0.0)
        return pruned_IO, float(((weight_IO - pruned_IO).square().sum(1) * diagonal_I).sum())
