"""Small layer methods that tests of the core use: the core is tested without any plugin."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from orchestrator.layer_method import LayerMethod, LayerResult, Needs
from orchestrator.method import Invariant, Stage
from orchestrator.scheme import QuantizedWeight, QuantScheme
from orchestrator.statistics import InputMoment


class Identity(LayerMethod):
    """Changes nothing; keeps the statistics it was shown in `seen`, by call."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "identity"
    paper: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs.INPUT_MOMENT
    seen: ClassVar[list[InputMoment | None]] = []

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        self.seen.append(statistic)
        return LayerResult(weight_OI, metrics={"calls": 1.0, "damping_used": 0.01, "relative_error": 0.5})


class KeepLarge(LayerMethod):
    """Zeroes the smaller half of every four weights."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "keep_large"
    paper: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs.WEIGHT

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(half_of_every_four(weight_OI))


class ScaleByInput(LayerMethod):
    """Shrinks input features by their mean magnitude: a change that depends on the calibration inputs."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "scale_by_input"
    paper: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs.INPUT_NORM

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        assert statistic is not None and statistic.hessian_II is None
        return LayerResult(weight_OI / (1 + statistic.sum_abs_I / statistic.num_tokens))


class Round(LayerMethod):
    """Rounds to nearest, so that zeros stay zeros."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "round"
    paper: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs.WEIGHT
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS})

    num_bits: int = 4
    symmetric: bool = True
    group_size: int | None = 32
    scale_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def scheme(self) -> QuantScheme:
        strategy: Literal["group", "channel"] = "channel" if self.group_size is None else "group"
        return QuantScheme(
            num_bits=self.num_bits, symmetric=self.symmetric, strategy=strategy, group_size=self.group_size
        )

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        encoding = round_weight(weight_OI, self.scheme(), getattr(torch, self.scale_dtype))
        return LayerResult(encoding.dequantize(weight_OI.dtype), encoding)


def half_of_every_four(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return the weight with the two smallest of every four neighbours set to zero."""
    weight_XM = weight_OI.reshape(-1, 4)
    drop_X2 = weight_XM.abs().argsort(dim=1, stable=True)[:, :2]
    return weight_XM.scatter(1, drop_X2, 0.0).view_as(weight_OI)


def round_weight(weight_OI: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest on a grid of minimum and maximum."""
    weight_OGW = weight_OI.float().view(weight_OI.shape[0], -1, scheme.group_width(weight_OI.shape[1]))
    low_OG, high_OG = weight_OGW.amin(-1).clamp(max=0), weight_OGW.amax(-1).clamp(min=0)
    if scheme.symmetric:
        scale_OG = (2 * torch.maximum(-low_OG, high_OG) / (2**scheme.num_bits - 1)).to(dtype)
        zero_OG = torch.zeros_like(scale_OG)
    else:
        scale_OG = ((high_OG - low_OG) / (2**scheme.num_bits - 1)).to(dtype)
        zero_OG = (scheme.quant_min - low_OG / scale_OG).round().clamp(scheme.quant_min, scheme.quant_max)
    q_OGW = (weight_OGW / scale_OG.float().unsqueeze(-1)).round() + zero_OG.unsqueeze(-1)
    q_OI = q_OGW.clamp(scheme.quant_min, scheme.quant_max).to(torch.int8).view_as(weight_OI)
    return QuantizedWeight(q_OI, scale_OG, None if scheme.symmetric else zero_OG.to(torch.int8), scheme)
