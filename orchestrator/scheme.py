"""Quantization schemes in the words of compressed-tensors, and the integers of a quantized weight.

Shape legend: O = out features, I = in features, G = groups along I (1 for strategy 'channel').
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


class QuantScheme(BaseModel):
    """How a weight is quantized; field names and values as in compressed-tensors `QuantizationArgs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: int
    type: Literal["int"] = "int"
    symmetric: bool = True
    strategy: Literal["group", "channel"] = "group"
    group_size: int | None = 128
    actorder: Literal["static"] | None = None

    @property
    def quant_min(self) -> int:
        """Smallest stored integer (signed, as compressed-tensors stores both kinds)."""
        return -(1 << (self.num_bits - 1))

    @property
    def quant_max(self) -> int:
        """Largest stored integer."""
        return (1 << (self.num_bits - 1)) - 1

    def group_width(self, in_features: int) -> int:
        """Number of neighbouring input features that share a scale."""
        return in_features if self.strategy == "channel" else int(self.group_size or in_features)

    def weight_args(self) -> dict[str, Any]:
        """The `weights` entry of a compressed-tensors `config_groups` group."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid: ``w = (q - zero_point) * scale``, group by group along the input features.

    q_OI: int8, in [scheme.quant_min, scheme.quant_max].
    scale_OG: in the dtype in which the checkpoint stores it (the model's dtype).
    zero_point_OG: int8, or None for a symmetric scheme.
    """

    q_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor | None
    scheme: QuantScheme

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [O, I] as engines compute it: in the scale's dtype, then cast to `dtype`."""
        num_out, num_in = self.q_OI.shape
        width = self.scheme.group_width(num_in)
        q_OGW = self.q_OI.view(num_out, num_in // width, width).to(self.scale_OG.dtype)
        if self.zero_point_OG is not None:
            q_OGW = q_OGW - self.zero_point_OG.unsqueeze(-1).to(self.scale_OG.dtype)
        return (q_OGW * self.scale_OG.unsqueeze(-1)).view(num_out, num_in).to(dtype)
