"""SparseGPT: remove weights block of columns by block of columns; what is left makes up for the error.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. With the damped H = X^T X / n and U upper triangular,
U^T U = H^-1, a weight's saliency is w_i^2 / U_ii^2 (eq. 4); removing it adds -w_i / U_ii * U_{i,j} to the columns j > i
of its row. In every block of columns the share `sparsity` with the lowest saliency goes, over all rows together; for
n:m patterns, n of the m columns that come next. Saliencies are those of the weights as updated by then.

Run in the equal form of Chee et al. 2023 (arXiv:2307.13304, theorem 6), as is GPTQ: with H = A diag(r^2) A^T, A unit
upper triangular, column k becomes W_k + sum_{j<k} (W - W^)_j A_jk, or zero; and 1 / U_ii = r_i, so H is never inverted.

Choices: weights that are zero already go first and stay zero; input features that never occurred get weight zero. If H
is not positive definite, damping is raised tenfold up to five times; then weights are removed by the diagonal of H and
none is updated, which is recorded (`fallback_diagonal`).

Shape legend: O = out features, I = in features, B = columns of a block, M = columns of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    Stage,
    StepError,
    Work,
)
from orchestrator_pruning.patterns import lowest, num_pruned, require_finite, run_of, zero_metrics

if TYPE_CHECKING:
    import torch


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
        if self.pattern != "block":
            kept, width = run_of(self.pattern)
            if self.sparsity != 1 - kept / width:
                raise ValueError(f"pattern {self.pattern} fixes sparsity at {1 - kept / width}, not {self.sparsity}")
            if self.block_size % width:
                raise ValueError(
                    f"block_size {self.block_size} is no multiple of the {width} of pattern {self.pattern}"
                )
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
            return None
        _, width = run_of(self.pattern)
        if layer.in_features % width:
            return "pattern", f"{width} does not divide in_features {layer.in_features}"
        return None

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
        import torch

        unit_lower_II, pivots_I = factor.unit_lower_II, factor.pivots_I.float()
        pruned_IO, error_IO = torch.empty_like(weight_IO), torch.empty_like(weight_IO)
        loss = torch.zeros((), dtype=torch.float64, device=weight_IO.device)
        for first, stop in self._blocks(len(weight_IO)):
            block = slice(first, stop)
            target_BO = weight_IO[block].clone()
            if first:
                target_BO.addmm_(unit_lower_II[block, :first], error_IO[:first])
            feedback_BB = unit_lower_II[block, block].contiguous()
            errors_BO = error_IO[block]
            width = stop - first if self.pattern == "block" else run_of(self.pattern)[1]
            for start in range(0, stop - first, width):
                run = slice(start, start + width)
                if start:
                    target_BO[run].addmm_(feedback_BB[run, :start], errors_BO[:start])
                updated_MO = _updated(weight_IO[block][run], target_BO[run], feedback_BB[run, run])
                removed_MO = self._removed(updated_MO, weight_IO[block][run], pivots_I[block][run])
                for column in range(start, start + width):
                    target_O = target_BO[column]
                    if column > start:
                        target_O.addmv_(errors_BO[start:column].T, feedback_BB[column, start:column])
                    kept_O = target_O.masked_fill(removed_MO[column - start], 0.0)
                    pruned_IO[first + column] = kept_O
                    torch.sub(weight_IO[first + column], kept_O, out=errors_BO[column])
                    target_O.sub_(kept_O)
            loss += (target_BO.square().sum(1).double() * factor.pivots_I[block]).sum()
        # The loss is that of the damped H; damping added its share of the squared error.
        damped = float(loss - factor.damping * error_IO.double().square().sum())
        return pruned_IO, factor.mean * max(damped, 0.0)

    def _by_diagonal(self, weight_IO: torch.Tensor, diagonal_I: torch.Tensor) -> tuple[torch.Tensor, float]:
        pruned_IO = weight_IO.clone()
        for first, stop in self._blocks(len(weight_IO)):
            width = stop - first if self.pattern == "block" else run_of(self.pattern)[1]
            for start in range(first, stop, width):
                run = slice(start, start + width)
                pruned_IO[run].masked_fill_(self._removed(weight_IO[run], weight_IO[run], diagonal_I[run]), 0.0)
        return pruned_IO, float(((weight_IO - pruned_IO).square().sum(1) * diagonal_I).sum())

    def _blocks(self, num_in: int) -> Iterator[tuple[int, int]]:
        for start in range(0, num_in, self.block_size):
            yield start, min(start + self.block_size, num_in)

    def _removed(self, updated_MO: torch.Tensor, weight_MO: torch.Tensor, pivots_M: torch.Tensor) -> torch.Tensor:
        """Mark what goes of some columns, [M, O] bool: the lowest w^2 r^2, before them what is zero already."""
        score_MO = (updated_MO.square() * pivots_M[:, None]).masked_fill_(weight_MO == 0, -1.0)
        require_finite("saliencies", score_MO)
        if self.pattern == "block":
            score_X = score_MO.flatten()
            # Zeros of earlier steps stay, even if there are more of them than are asked for.
            return lowest(score_X, num_pruned(self.sparsity, len(score_X))).view_as(score_MO) | (weight_MO == 0)
        kept, width = run_of(self.pattern)
        return lowest(score_MO.T, width - kept).T | (weight_MO == 0)


def _updated(weight_MO: torch.Tensor, target_MO: torch.Tensor, unit_lower_MM: torch.Tensor) -> torch.Tensor:
    """Return columns as the usual form has updated them when it comes to the first of them.

    They are those that make up best for the errors so far: W_M + F A_MM^-1, where F is what `target_MO` has beyond W_M.
    """
    import torch

    made_up_MO: torch.Tensor = torch.linalg.solve_triangular(
        unit_lower_MM, target_MO - weight_MO, upper=False, unitriangular=True
    )
    return made_up_MO.add_(weight_MO)
