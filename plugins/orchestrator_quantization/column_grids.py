"""Which grid each column is rounded onto when columns are quantized one after another.

Shape legend: O = out features, I = in features, G = groups along I, S = columns of a segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.api import QuantScheme
from orchestrator_quantization.grid import Grid, fit_grid

if TYPE_CHECKING:
    import torch


class UpdatedGrids:
    """Columns in their own order; a group's grid is fitted when its first column is reached, to updated weights.

    segments: [start, end) of columns whose grids are fitted at one moment: the groups. entries: their starts.
    """

    def __init__(self, scheme: QuantScheme, dtype: torch.dtype, clip: str, num_in: int) -> None:
        self._scheme, self._dtype, self._clip = scheme, dtype, clip
        self.width = scheme.group_width(num_in)
        self.entries = range(0, num_in, self.width)
        self.segments = [(start, start + self.width) for start in self.entries]
        self._grids: list[Grid] = []

    def enter(self, weight_SO: torch.Tensor) -> None:
        """Fit the grid of the next segment to its weights as they have been updated."""
        self._grids.append(fit_grid(weight_SO.T, self._scheme, self._dtype, self._clip))

    def of(self, column: int) -> Grid:
        """Return the grid [O] of a column of the segment that was entered last."""
        return self._grids[-1]

    def all(self) -> Grid:
        """Return the grids of all groups [O, G]."""
        import torch

        scale_OG = torch.stack([grid.scale_X for grid in self._grids], 1)
        zero_point_OG = torch.stack([grid.zero_point_X for grid in self._grids], 1)
        return Grid(scale_OG, zero_point_OG, self._scheme, self._dtype)


class StaticGrids:
    """Columns in any order; all grids are fitted to the weights as they were before the first update."""

    def __init__(
        self,
        weight_OI: torch.Tensor,
        scheme: QuantScheme,
        dtype: torch.dtype,
        clip: str,
        order_I: torch.Tensor,
        block_size: int,
    ) -> None:
        num_out, num_in = weight_OI.shape
        width = scheme.group_width(num_in)
        self.entries = ()
        self.segments = [(start, min(start + block_size, num_in)) for start in range(0, num_in, block_size)]
        self._grid_OG = fit_grid(weight_OI.view(num_out, -1, width), scheme, dtype, clip)
        scale_GO = self._grid_OG.scale_X.T.contiguous()
        zero_point_GO = self._grid_OG.zero_point_X.T.contiguous()
        pairs = zip(scale_GO, zero_point_GO, strict=True)
        self._grids = [Grid(scale_O, zero_point_O, scheme, dtype) for scale_O, zero_point_O in pairs]
        self._group_of: list[int] = (order_I // width).tolist()

    def of(self, column: int) -> Grid:
        """Return the grid [O] of the column that comes at this place in the order."""
        return self._grids[self._group_of[column]]

    def all(self) -> Grid:
        """Return the grids of all groups [O, G]."""
        return self._grid_OG
