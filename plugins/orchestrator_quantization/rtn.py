"""RTN: round every weight to the nearest point of its group's grid; needs no data.

The baseline of the GPTQ paper (Frantar et al. 2022, arXiv:2210.17323, sec. 4):
q = clip(round(w / s) + z), w^ = (q - z) * s; grid.py says how s and z are chosen. Zeros stay exactly zero.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.api import InputMoment, LayerResult, Needs, Stage
from orchestrator_quantization.grid import require_weight, round_to_nearest, zero_groups
from orchestrator_quantization.weight_only import WeightOnly

if TYPE_CHECKING:
    import torch


class RTN(WeightOnly):
    """Round every weight to the nearest grid point."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = "arXiv:2210.17323, sec. 4 (baseline)"
    needs: ClassVar[Needs] = Needs.WEIGHT

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the rounded weight and its integers. Raise `StepError` for weights that are not finite."""
        import torch

        require_weight(weight_OI, self.storage_dtype())
        encoding = round_to_nearest(weight_OI, self.scheme(), self.storage_dtype(), self.clip)
        rounded_OI = encoding.dequantize(torch.float32)
        energy = weight_OI.square().sum().item()
        error = (weight_OI - rounded_OI).square().sum().item()
        metrics = {
            "relative_weight_error": error / energy if energy else 0.0,
            "zero_groups": zero_groups(weight_OI, self.scheme()),
            "zero_fraction": (rounded_OI == 0).float().mean().item(),
        }
        return LayerResult(rounded_OI, encoding, metrics)
