"""FP8: weights in float8 with one scale per output channel, inputs in float8 with one scale per token; no data needed.

Micikevicius et al. 2022, arXiv:2209.05433: the format E4M3 (largest number 448). W = q * s, s = max|row| / 448 and
q = round(W / s) to the nearest number of the format; the scale of a token follows from the token when the model runs.
Rounding moves a weight by at most 1/16 of itself, so small weights of a row keep their precision where integers would
lose it; large ones are rounded more coarsely than eight-bit integers do.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.api import (
    FLOAT8_MAX,
    InputMoment,
    InputScheme,
    LayerResult,
    Needs,
    QuantizedWeight,
    QuantScheme,
    Stage,
)
from orchestrator_quantization.grid import require_weight
from orchestrator_quantization.weight_only import StoredScales

if TYPE_CHECKING:
    import torch


class FP8(StoredScales):
    """Round weights and inputs to the nearest float8 number."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "fp8"
    paper: ClassVar[str] = "arXiv:2209.05433 (E4M3)"
    needs: ClassVar[Needs] = Needs.WEIGHT

    def scheme(self) -> QuantScheme:
        """The scheme of the result, in the words of compressed-tensors."""
        inputs = InputScheme(type="float")
        return QuantScheme(num_bits=8, type="float", strategy="channel", group_size=None, input_activations=inputs)

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the rounded weight and its numbers. Raise `StepError` for weights that are not finite."""
        import torch

        require_weight(weight_OI, self.storage_dtype())
        largest_O1 = weight_OI.abs().amax(1, keepdim=True)
        # A scale too small for its dtype would take its row with it; of a row of zeros any scale will do.
        least = torch.finfo(self.storage_dtype()).smallest_normal
        scale_O1 = (largest_O1 / FLOAT8_MAX).clamp_(min=least).to(self.storage_dtype())
        scale_O1 = torch.where(largest_O1 == 0, 1.0, scale_O1)
        # Beyond the largest number there is only NaN; a scale that was rounded down can lead there.
        q_OI = (weight_OI / scale_O1.float()).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        encoding = QuantizedWeight(q_OI, scale_O1, None, self.scheme())
        rounded_OI = encoding.dequantize(torch.float32)
        energy = float(weight_OI.square().sum())
        error = float((weight_OI - rounded_OI).square_().sum())
        metrics = {
            "relative_weight_error": error / energy if energy else 0.0,
            "zero_fraction": float((rounded_OI == 0).float().mean()),
        }
        return LayerResult(rounded_OI, encoding, metrics)
