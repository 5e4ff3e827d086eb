"""The rule of GPTQ: every column goes to its grid, zeros stay or become exactly zero.

Shape legend: I = in features (in the order in which they are quantized), O = out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.api import SaliencyMask
from orchestrator_quantization.column_grids import StaticGrids, UpdatedGrids

if TYPE_CHECKING:
    import torch


class Rounding:
    """q_IO: the integers, as int8. mask: chooses weights that become zero on the way; None: no more than are zero."""

    def __init__(
        self, weight_IO: torch.Tensor, grids: UpdatedGrids | StaticGrids, mask: SaliencyMask | None = None
    ) -> None:
        import torch

        self.q_IO = torch.empty(weight_IO.shape, dtype=torch.int8, device=weight_IO.device)
        self.segments = grids.segments
        self._grids, self._mask = grids, mask
        zero_IO = weight_IO == 0 if mask is None else mask.zero_IO
        self._zero_IO = zero_IO if mask is not None or bool(zero_IO.any()) else None
        chosen_at = range(0, len(weight_IO), mask.width) if mask else ()
        self.entries = {*grids.entries, *chosen_at}
        self._chosen_at = set(chosen_at)

    def enter(self, column: int, updated: Callable[[int], torch.Tensor]) -> None:
        """Choose zeros, then fit the grid of a group to what is left, as GPTQ has updated it by then."""
        if column in self._chosen_at and self._mask is not None:
            self._mask.choose(column, updated)
        if isinstance(self._grids, UpdatedGrids) and column in self._grids.entries:
            weight_SO = updated(self._grids.width)
            if self._zero_IO is not None:  # what becomes zero must not widen the range
                weight_SO.masked_fill_(self._zero_IO[column : column + len(weight_SO)], 0.0)
            self._grids.enter(weight_SO)

    def result(self, column: int, target_O: torch.Tensor) -> torch.Tensor:
        """Return the grid points nearest to the target."""
        import torch

        grid = self._grids.of(column)
        q_O, point_O = grid.nearest(target_O)
        if self._zero_IO is not None:
            zero_O = self._zero_IO[column]
            q_O = torch.where(zero_O, grid.zero_point_X, q_O)
            point_O.masked_fill_(zero_O, 0.0)
        self.q_IO[column] = q_O
        return point_O
