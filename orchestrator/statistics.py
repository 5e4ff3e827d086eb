"""What calibration measured about the inputs of a linear layer; one record per distinct input, shared by all
layers that read it (q/k/v, gate/up) and by every method that asks.

Shape legend: T = tokens, I = in features, S = features of a strip.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.factor import HessianFactor, Order, factorize
from orchestrator.parallel import StoppedError

if TYPE_CHECKING:
    import torch

# Width of the strips in which the lower triangle of X^T X is computed. A product with fewer columns is summed in the
# same order, so the width changes no bit of the result on a CPU; it decides how much of the upper triangle is
# computed in vain, and how well the kernels are fed.
CPU_STRIP, CUDA_STRIP = 128, 2048
FactorMemo = Callable[[float, Order, Callable[[], HessianFactor | None]], HessianFactor | None]


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

    def __post_init__(self) -> None:
        # A memo, no part of the record: the factor follows from H.
        found: dict[tuple[float, Order], HessianFactor | None] = {}

        def remember(damping: float, order: Order, make: Callable[[], HessianFactor | None]) -> HessianFactor | None:
            if (damping, order) not in found:
                found[damping, order] = make()
            return found[damping, order]

        self.share_factors(remember)

    def norm_I(self) -> torch.Tensor:
        """The Euclidean norm of each input feature over all tokens."""
        return self.sum_squares_I.sqrt()

    def require_hessian(self) -> torch.Tensor:
        """Return H; an error of the caller if the statistic was collected without it."""
        if self.hessian_II is None:
            raise ValueError("this statistic holds no H: declare needs = Needs.INPUT_MOMENT")
        return self.hessian_II

    def factor(self, damping: float, order: Order = "given") -> HessianFactor | None:
        """Return the factor of the damped H (see `orchestrator.factor.factorize`); computed once, then remembered."""
        hessian_II = self.require_hessian()
        memo: FactorMemo = self.__dict__["_memo"]
        factor = memo(damping, order, lambda: factorize(hessian_II, self.num_tokens, damping, order))
        return factor and factor.to(hessian_II.device)

    def divided(self, scale_I: torch.Tensor) -> InputMoment:
        """Return the record of x / s for s > 0."""
        hessian_II = self.hessian_II
        return InputMoment(
            self.num_tokens,
            self.sum_squares_I / scale_I.square(),
            self.sum_I / scale_I,
            self.sum_abs_I / scale_I,
            self.max_abs_I / scale_I,
            None if hessian_II is None else (hessian_II / scale_I).div_(scale_I[:, None]),
        )

    def to(self, device: torch.device | str) -> InputMoment:
        """Return the record on a device, with the same memory of factors."""
        import torch

        if self.sum_I.device == torch.device(device):
            return self
        moved = replace(
            self,
            **{
                name: value.to(device)
                for name, value in vars(self).items()
                if name not in ("num_tokens", "_memo") and value is not None
            },
        )
        moved.share_factors(self.__dict__["_memo"])
        return moved

    def share_factors(self, memo: FactorMemo) -> None:
        """Let the walk decide where factors are remembered: with the record, for all runs that share it."""
        self.__dict__["_memo"] = memo


def alike(record: InputMoment) -> InputMoment:
    """Return what stands for a record without tokens: one token whose inputs are all alike and unrelated, H = 1.

    Rounding is then to nearest, and weights compete by their size alone.
    """
    import torch

    ones_I = torch.ones_like(record.sum_I)
    hessian_II = None if record.hessian_II is None else torch.eye(len(ones_I), device=ones_I.device)
    return InputMoment(1, ones_I, ones_I, ones_I, ones_I, hessian_II)


class InputMomentBuilder:
    """Accumulates an `InputMoment` batch by batch, in float32.

    Several threads may add batches at once: every part of the record takes them in the order of their numbers, so
    that its sums do not depend on how many threads there are.
    """

    def __init__(self, num_features: int, *, with_hessian: bool, device: torch.device | str = "cpu") -> None:
        import torch

        self._num_tokens = 0
        self._sum_squares_I = torch.zeros(num_features, device=device)
        self._sum_I = torch.zeros(num_features, device=device)
        self._sum_abs_I = torch.zeros(num_features, device=device)
        self._max_abs_I = torch.zeros(num_features, device=device)
        self._hessian_II = torch.zeros(num_features, num_features, device=device) if with_hessian else None
        self._strip = CPU_STRIP if self._sum_I.device.type == "cpu" else CUDA_STRIP
        num_strips = -(-num_features // self._strip) if with_hessian else 0
        self.turns = Turns(1 + num_strips)

    def add(self, inputs: torch.Tensor, number: int | None = None) -> None:
        """Add inputs [..., I]; every leading position counts as one token.

        number: of the batch, counted from 0 without gaps; None: the next one. Waits for the batches before it.
        """
        x_TI = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        number = self.turns.next(0) if number is None else number
        abs_TI = x_TI.abs()
        sum_I, abs_sum_I = x_TI.sum(0), abs_TI.sum(0)
        max_I = abs_TI.amax(0) if len(abs_TI) else abs_sum_I
        square_sum_I = (x_TI * x_TI).sum(0) if self._hessian_II is None else None  # else it is the diagonal of H
        with self.turns.take(0, number):
            self._num_tokens += x_TI.shape[0]
            self._sum_I += sum_I
            self._sum_abs_I += abs_sum_I
            self._max_abs_I = self._max_abs_I.maximum(max_I)
            if square_sum_I is not None:
                self._sum_squares_I += square_sum_I
        if self._hessian_II is not None:
            for part, start in enumerate(range(0, len(self._sum_I), self._strip), 1):
                with self.turns.take(part, number):
                    accumulate_strip(self._hessian_II, x_TI, start, self._strip)

    def pass_over(self, number: int) -> None:
        """Say that batch `number` holds no token for this input, if it was not added."""
        for part in range(len(self.turns)):
            if self.turns.next(part) <= number:
                with self.turns.take(part, number):
                    pass

    def finish(self) -> InputMoment:
        """Return the record; the builder is not used afterwards."""
        if self._hessian_II is not None:
            mirror_lower_(self._hessian_II)
            self._sum_squares_I = self._hessian_II.diagonal().clone()
        return InputMoment(
            self._num_tokens,
            self._sum_squares_I,
            self._sum_I,
            self._sum_abs_I,
            self._max_abs_I,
            self._hessian_II,
        )


def accumulate_lower(hessian_II: torch.Tensor, x_TI: torch.Tensor, strip: int = CPU_STRIP) -> None:
    """Add X^T X to the lower triangle of H, and to some entries above it."""
    for start in range(0, len(hessian_II), strip):
        accumulate_strip(hessian_II, x_TI, start, strip)


def accumulate_strip(hessian_II: torch.Tensor, x_TI: torch.Tensor, start: int, width: int) -> None:
    """Add to rows [start, start + width) of H, up to the diagonal and the rest of the square on it."""
    end = min(start + width, len(hessian_II))
    hessian_II[start:end, :end].addmm_(x_TI[:, start:end].T, x_TI[:, :end])


def mirror_lower_(matrix_II: torch.Tensor, strip: int = 1024) -> None:
    """Make a matrix symmetric from its lower triangle, in place."""
    num = len(matrix_II)
    for start in range(0, num, strip):
        end = min(start + strip, num)
        corner_SS = matrix_II[start:end, start:end]
        corner_SS.copy_(corner_SS.tril() + corner_SS.tril(-1).T)
        matrix_II[start:end, end:] = matrix_II[end:, start:end].T


class Turns:
    """Lets numbered callers pass each of several gates in the order of their numbers."""

    def __init__(self, gates: int) -> None:
        self._next = [0] * gates
        self._condition = threading.Condition()
        self._aborted = False

    def __len__(self) -> int:
        return len(self._next)

    def next(self, gate: int) -> int:
        """The number that may pass the gate next."""
        return self._next[gate]

    def abort(self) -> None:
        """Let nobody wait any longer: an earlier number will not come."""
        with self._condition:
            self._aborted = True
            self._condition.notify_all()

    @contextmanager
    def take(self, gate: int, number: int) -> Iterator[None]:
        """Wait until every number before has passed, and pass. Raises `StoppedError` after `abort`."""
        with self._condition:
            if self._next[gate] > number:
                raise RuntimeError(f"number {number} has passed this gate already")
            self._condition.wait_for(lambda: self._aborted or self._next[gate] == number)
            if self._aborted:
                raise StoppedError
        yield
        with self._condition:
            self._next[gate] = number + 1
            self._condition.notify_all()
