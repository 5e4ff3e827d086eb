"""fp8: keys and values as float8 e4m3, with one static scale for the keys and one for the values of each layer.

As vLLM and SGLang do (`kv_cache_dtype: fp8`): stored is x / scale, saturated at the largest e4m3 number, and the scales
come from the checkpoint (`quantize: kv_scales` writes them); where it has none they are 1.0. A
layer's scale is its largest |x| over calibration text / 448, so that nothing saturates and little falls below the
smallest number.

Legend: B = 1 stream, K = key/value heads, T = new tokens, N = tokens kept, D = width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from orchestrator.api import FLOAT8_MAX, ModelShape, Stage, read_kv_scales
from orchestrator_kvcache.policy import ExtendedStore, LayerPolicy, Store
from orchestrator_kvcache.storage import elements_per_token

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from orchestrator.api import Checkpoint

_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.")
_SCALE_BYTES = 4  # float32


class FP8(LayerPolicy):
    """Stores keys and values in 8-bit floating point under static scales."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "fp8"
    paper: ClassVar = "Micikevicius et al. 2022, arXiv:2209.05433 (e4m3); scales as vLLM reads them from a checkpoint."

    scales: Literal["checkpoint", "one"] = Field(
        "checkpoint", description="Scales stored with the model, 1.0 in layers without; 'one': 1.0 in all layers."
    )

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        found = scales_from(checkpoint) if self.scales == "checkpoint" else {}
        return [FP8Store(*found.get(layer, (1.0, 1.0))) for layer in range(model.config.num_hidden_layers)]

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        return 2 * elements_per_token(shape) * tokens + (2 * _SCALE_BYTES * shape.num_layers if tokens else 0)


class FP8Store(ExtendedStore):
    """Keys and values of one layer in float8, and their two scales."""

    def __init__(self, k_scale: float, v_scale: float) -> None:
        self.scales = (k_scale, v_scale)
        self.scale_2: Tensor | None = None
        self.keys_BKND: Tensor | None = None
        self.values_BKND: Tensor | None = None

    def length(self) -> int:
        return 0 if self.keys_BKND is None else self.keys_BKND.shape[2]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.keys_BKND, self.values_BKND, self.scale_2) if tensor is not None]

    def extend(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        if self.scale_2 is None:
            self.scale_2 = torch.tensor(self.scales, dtype=torch.float32, device=keys_BKTD.device)
        k_scale, v_scale = self.scale_2
        self.keys_BKND = _joined(self.keys_BKND, to_fp8(keys_BKTD, k_scale))
        self.values_BKND = _joined(self.values_BKND, to_fp8(values_BKTD, v_scale))
        keys_BKND, values_BKND = self.keys_BKND.float() * k_scale, self.values_BKND.float() * v_scale
        return keys_BKND.to(keys_BKTD.dtype), values_BKND.to(values_BKTD.dtype)


def scales_from(checkpoint: Checkpoint) -> dict[int, tuple[float, float]]:
    """Return (k_scale, v_scale) of each layer that has them stored, {} for a checkpoint without.

    Raises `StepError` for a layer that has only one of them, and for a scale that is no positive number.
    """
    found = {}
    for attention, scales in read_kv_scales(checkpoint).items():
        layer = _LAYER.search(f"{attention}.")
        if layer:
            found[int(layer["layer"])] = scales
    return found


def to_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Return values / scale as float8 e4m3, saturated at its largest number."""
    import torch

    # Torch would make NaN of what is too large.
    return (values.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def _joined(kept_BKND: Tensor | None, new_BKTD: Tensor) -> Tensor:
    import torch

    if kept_BKND is None:
        return new_BKTD
    # As bytes, for not all devices join fp8.
    joined = torch.cat((kept_BKND.view(torch.uint8), new_BKTD.view(torch.uint8)), 2)
    return joined.view(torch.float8_e4m3fn)
