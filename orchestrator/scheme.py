"""Quantization schemes in the words of compressed-tensors, and the numbers of a quantized weight.

Shape legend: O = out features, I = in features, G = groups along I (1 for strategy 'channel'), X = any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

FLOAT8_MAX = 448.0  # of float8_e4m3fn, which has no infinity


class InputScheme(BaseModel):
    """How the inputs of a layer are quantized: symmetric, in 8 bits, with one scale per token or per layer.

    dynamic: the scale of a token follows from the token. Otherwise it is one number per layer, in the checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: Literal[8] = 8
    type: Literal["int", "float"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["token", "tensor"] = "token"
    dynamic: bool = True

    @property
    def half_range(self) -> float:
        """The largest |x| is this many steps: 127.5 for integers, as in compressed-tensors, so that -128 is used."""
        return FLOAT8_MAX if self.type == "float" else 127.5

    def fake_quantize(self, input_XI: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return the inputs as an engine multiplies them: on their grid, in their dtype; the arithmetic is float32.

        scale: one number, of a static scheme.
        """
        import torch

        value_XI = input_XI.float()
        if scale is None:
            scale_X1 = value_XI.abs().amax(-1, keepdim=True) / self.half_range
            scale_X1 = torch.where(scale_X1 == 0, 1.0, scale_X1)
        else:
            scale_X1 = scale.float()
        value_XI = value_XI / scale_X1
        if self.type == "float":
            value_XI = value_XI.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float()
        else:
            value_XI = value_XI.round_().clamp_(-128, 127)
        return (value_XI * scale_X1).to(input_XI.dtype)


class QuantScheme(BaseModel):
    """How a weight is quantized; field names and values as in compressed-tensors `QuantizationArgs`.

    input_activations: how the layer's inputs are quantized; None: not at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: int
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["group", "channel"] = "group"
    group_size: int | None = 128
    actorder: Literal["static"] | None = None
    input_activations: InputScheme | None = None

    @property
    def format(self) -> str:
        """The layout of compressed-tensors in which such a weight is stored."""
        if self.type == "float":
            return "float-quantized"
        return "int-quantized" if self.input_activations else "pack-quantized"

    @property
    def quant_min(self) -> float:
        """Smallest stored number (integers are signed, as compressed-tensors stores both kinds)."""
        return -FLOAT8_MAX if self.type == "float" else -(1 << (self.num_bits - 1))

    @property
    def quant_max(self) -> float:
        """Largest stored number."""
        return FLOAT8_MAX if self.type == "float" else (1 << (self.num_bits - 1)) - 1

    def group_width(self, in_features: int) -> int:
        """Number of neighbouring input features that share a scale."""
        return in_features if self.strategy == "channel" else int(self.group_size or in_features)

    def weight_args(self) -> dict[str, Any]:
        """The `weights` entry of a compressed-tensors `config_groups` group."""
        return self.model_dump(mode="json", exclude={"input_activations"})

    def input_args(self) -> dict[str, Any] | None:
        """The `input_activations` entry of the same group."""
        return None if self.input_activations is None else self.input_activations.model_dump(mode="json")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid: ``w = (q - zero_point) * scale``, group by group along the input features.

    q_OI: int8, or float8_e4m3fn for type 'float'; in [scheme.quant_min, scheme.quant_max].
    scale_OG: in the dtype in which the checkpoint stores it (the model's dtype).
    zero_point_OG: int8, or None for a symmetric scheme.
    input_scale_1: of the layer's inputs, for a scheme with static ones, in the dtype of the weight's scales.
    """

    q_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor | None
    scheme: QuantScheme
    input_scale_1: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [O, I] as engines compute it: in the scale's dtype, then cast to `dtype`."""
        num_out, num_in = self.q_OI.shape
        width = self.scheme.group_width(num_in)
        q_OGW = self.q_OI.view(num_out, num_in // width, width).to(self.scale_OG.dtype)
        if self.zero_point_OG is not None:
            q_OGW = q_OGW - self.zero_point_OG.unsqueeze(-1).to(self.scale_OG.dtype)
        return (q_OGW * self.scale_OG.unsqueeze(-1)).view(num_out, num_in).to(dtype)
