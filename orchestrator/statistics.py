"""What calibration measured about the inputs of a linear layer; one record per distinct input, shared by all
layers that read it (q/k/v, gate/up) and by every method that asks.

Shape legend: T = tokens, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InputMoment:
    """Sums over all calibration tokens of a layer's input x, [I] unless said otherwise, float32.

    num_tokens: number of tokens T.
    sum_squares_I: sum of x^2, the diagonal of H = X^T X.
    sum_I, sum_abs_I, max_abs_I: sum of x, sum of |x|, largest |x|.
    hessian_II: H = X^T X (a sum, not a mean), symmetric [I, I]; None where the method needs no more than norms.
    """

    num_tokens: int
    sum_squares_I: torch.Tensor
    sum_I: torch.Tensor
    sum_abs_I: torch.Tensor
    max_abs_I: torch.Tensor
    hessian_II: torch.Tensor | None = None

    def norm_I(self) -> torch.Tensor:
        """The Euclidean norm of each input feature over all tokens."""
        return self.sum_squares_I.sqrt()

    def require_hessian(self) -> torch.Tensor:
        """Return H; an error of the caller if the statistic was collected without it."""
        if self.hessian_II is None:
            raise ValueError("this statistic holds no H: declare needs = Needs.INPUT_MOMENT")
        return self.hessian_II


class InputMomentBuilder:
    """Accumulates an `InputMoment` batch by batch, in float32."""

    def __init__(self, num_features: int, *, with_hessian: bool) -> None:
        import torch

        self._num_tokens = 0
        self._sum_squares_I = torch.zeros(num_features)
        self._sum_I = torch.zeros(num_features)
        self._sum_abs_I = torch.zeros(num_features)
        self._max_abs_I = torch.zeros(num_features)
        self._hessian_II = torch.zeros(num_features, num_features) if with_hessian else None

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [..., I]; every leading position counts as one token."""
        x_TI = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        abs_TI = x_TI.abs()
        self._num_tokens += x_TI.shape[0]
        self._sum_squares_I += x_TI.square().sum(0)
        self._sum_I += x_TI.sum(0)
        self._sum_abs_I += abs_TI.sum(0)
        self._max_abs_I = self._max_abs_I.maximum(abs_TI.amax(0))
        if self._hessian_II is not None:
            self._hessian_II.addmm_(x_TI.T, x_TI)

    def finish(self) -> InputMoment:
        """Return the record; the builder is not used afterwards."""
        return InputMoment(
            self._num_tokens,
            self._sum_squares_I,
            self._sum_I,
            self._sum_abs_I,
            self._max_abs_I,
            self._hessian_II,
        )
