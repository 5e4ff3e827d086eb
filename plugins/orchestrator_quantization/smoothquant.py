"""SmoothQuant: weights and inputs in eight-bit integers, after moving part of the inputs' spread into the weights.

Xiao et al. 2022, arXiv:2211.10438. A few input channels are far larger than the rest, and one scale for all of a token
leaves the rest little precision. With x' = x / s and W' = W diag(s) the layer computes what it did (the walk divides
whatever produces x):

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)                        (eq. 4), alpha = `strength`

where max|W_j| is over the rows of all layers that read x. Weights are then rounded to nearest with one scale per output
channel; inputs when the model runs, with one scale per token (`activations: dynamic`, the paper's O1 and O2) or one per
layer, from the largest |x'| of the calibration (`static`, O3). Inputs that nothing can divide stay as they are.

Calibrated on the uncompressed model, as in the paper, so that all candidates share the records.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from orchestrator.api import (
    InputMode,
    InputMoment,
    InputScheme,
    LayerResult,
    Needs,
    QuantScheme,
    ScalingMethod,
    Stage,
    StepError,
)
from orchestrator_quantization.grid import require_finite, require_weight, round_to_nearest
from orchestrator_quantization.weight_only import StoredScales

if TYPE_CHECKING:
    import torch


class SmoothQuant(StoredScales, ScalingMethod):
    """Move spread from inputs into weights, then round both to eight-bit integers."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "smoothquant"
    paper: ClassVar[str] = "arXiv:2211.10438, eq. 4"
    needs: ClassVar[Needs] = Needs.INPUT_NORM
    inputs: ClassVar[InputMode] = "dense"

    strength: float = Field(
        0.5, ge=0, le=1, description="Share of the inputs' spread that weights take over: the paper's alpha."
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="Scales of inputs: of each token when the model runs, or one per layer from calibration."
    )

    def scheme(self) -> QuantScheme:
        """The scheme of the result, in the words of compressed-tensors."""
        dynamic = self.activations == "dynamic"
        inputs = InputScheme(strategy="token" if dynamic else "tensor", dynamic=dynamic)
        return QuantScheme(num_bits=8, strategy="channel", group_size=None, input_activations=inputs)

    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        """Return s [I]; 1 for an input that is always zero or meets nothing but zeros."""
        import torch

        input_I = _usable(statistic).max_abs_I
        weight_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0)
        scale_I = input_I**self.strength / weight_I ** (1 - self.strength)
        return torch.where((input_I > 0) & (weight_I > 0), scale_I, 1.0)

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the rounded weight and its integers. Raise `StepError` for unusable numbers."""
        import torch

        require_weight(weight_OI, self.storage_dtype())
        scheme, statistic = self.scheme(), _usable(statistic)
        encoding = round_to_nearest(weight_OI, scheme, self.storage_dtype(), "none")
        largest = statistic.max_abs_I.max()
        inputs = scheme.input_activations
        if inputs is not None and not inputs.dynamic:
            scale_1 = (largest.reshape(1) / inputs.half_range).to(self.storage_dtype())
            encoding = replace(encoding, input_scale_1=torch.where(scale_1 == 0, 1.0, scale_1))
        rounded_OI = encoding.dequantize(torch.float32)
        energy = float(weight_OI.square().sum())
        error = float((weight_OI - rounded_OI).square_().sum())
        typical = float(statistic.max_abs_I.mean())
        metrics = {
            "relative_weight_error": error / energy if energy else 0.0,
            # How far the largest input channel stands out, after smoothing: 1 means that all reach equally far.
            "max_input_spread": float(largest) / typical if typical else 1.0,
            "tokens": float(statistic.num_tokens),
            "zero_fraction": float((rounded_OI == 0).float().mean()),
        }
        return LayerResult(rounded_OI, encoding, metrics)


def _usable(statistic: InputMoment | None) -> InputMoment:
    if statistic is None or statistic.num_tokens == 0:
        raise StepError("smoothquant has no calibration tokens for this layer", remedy="calibrate on more text")
    require_finite("max |x|", statistic.max_abs_I)
    return statistic
