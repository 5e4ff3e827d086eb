"""Grids of integers, as compressed-tensors stores them: w = (q - z) s.

Symmetric: s = 2 max|w| / (2^b - 1), z = 0, q in [-2^(b-1), 2^(b-1) - 1]. Asymmetric: s = (max - min) / (2^b - 1),
z = round(q_min - min / s), where max and min are at least and at most 0. Choices: scales are rounded to the dtype they
are stored in before any weight is, points to the same dtype, as an engine computes them; a group of zeros has scale 1.

Shape legend: O = out features, I = in features, G = groups, W = width of a group, X = any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """group: neighbouring inputs with one scale; None: the whole row. dtype: of scales and points."""

    num_bits: int
    group: int | None
    symmetric: bool
    dtype: torch.dtype

    @property
    def lowest(self) -> int:
        return -(2 ** (self.num_bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.num_bits - 1) - 1

    def split(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """Return the weight by groups [O, G, W]."""
        return weight_OI.reshape(len(weight_OI), -1, self.group or weight_OI.shape[1])


def fit(weight_XW: torch.Tensor, setting: Setting, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero point [X, 1] for this share of the range of the weights."""
    low_X1 = weight_XW.amin(-1, keepdim=True).clamp(max=0) * share
    high_X1 = weight_XW.amax(-1, keepdim=True).clamp(min=0) * share
    steps = 2**setting.num_bits - 1
    width_X1 = 2 * torch.maximum(high_X1, -low_X1) if setting.symmetric else high_X1 - low_X1
    scale_X1 = (width_X1 / steps).to(setting.dtype).to(weight_XW.dtype)
    scale_X1[scale_X1 == 0] = 1
    if setting.symmetric:
        return scale_X1, torch.zeros_like(scale_X1)
    zero_X1 = torch.round(setting.lowest - low_X1 / scale_X1).clamp(setting.lowest, setting.highest)
    return scale_X1, zero_X1


def integers(weight_XW: torch.Tensor, scale_X1: torch.Tensor, zero_X1: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the integers of the nearest points."""
    return ((weight_XW / scale_X1).float().round() + zero_X1).clamp(setting.lowest, setting.highest)


def points(integer_XW: torch.Tensor, scale_X1: torch.Tensor, zero_X1: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the numbers that integers stand for."""
    return ((integer_XW - zero_X1) * scale_X1).to(setting.dtype).to(scale_X1.dtype)


def nearest(weight_XW: torch.Tensor, scale_X1: torch.Tensor, zero_X1: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the nearest points of the grid."""
    return points(integers(weight_XW, scale_X1, zero_X1, setting), scale_X1, zero_X1, setting)


def round_to_nearest(weight_OI: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return every weight rounded to the nearest point of its group's grid."""
    weight_OGW = setting.split(weight_OI)
    return nearest(weight_OGW, *fit(weight_OGW, setting), setting).reshape(weight_OI.shape)
