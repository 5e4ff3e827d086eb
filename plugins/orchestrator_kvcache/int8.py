"""int8: keys and values in 8 bits, with one scale for each token and head.

What engines call per-token-head quantization (vLLM's `int8_per_token_head`). Each token is rounded when it comes and
read rounded from then on, also by itself.

Legend: B = 1 stream, K = key/value heads, T = new tokens, N = tokens kept, D = width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import ModelShape, Stage
from orchestrator_kvcache.policy import ExtendedStore, LayerPolicy, Store

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from orchestrator.api import Checkpoint

_SCALE_BYTES = 4  # float32


class Int8(LayerPolicy):
    """Rounds keys and values to 8 bits as they come."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "int8"
    paper: ClassVar = "Round to nearest with a scale for each token and head, as ZeroQuant does (arXiv:2206.01861)."

    symmetric: bool = Field(
        True, description="Values from -127 to 127 times the scale; else from 0 to 255 above the smallest of the head."
    )

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        return [Int8Store(self.symmetric) for _ in range(model.config.num_hidden_layers)]

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        entry = shape.head_dim + _SCALE_BYTES * (1 if self.symmetric else 2)
        return 2 * shape.num_layers * shape.num_kv_heads * tokens * entry


class Int8Store(ExtendedStore):
    """Rounded keys and values of one layer, and their scales."""

    def __init__(self, symmetric: bool) -> None:
        self.symmetric = symmetric
        self.keys: tuple[Tensor, ...] = ()
        self.values: tuple[Tensor, ...] = ()

    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values]

    def extend(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = _joined(self.keys, self._rounded(keys_BKTD))
        self.values = _joined(self.values, self._rounded(values_BKTD))
        return self._read(self.keys).to(keys_BKTD.dtype), self._read(self.values).to(values_BKTD.dtype)

    def _rounded(self, tokens_BKTD: Tensor) -> tuple[Tensor, ...]:
        """Return integers [B, K, T, D], scales [B, K, T, 1] and, where not symmetric, the smallest [B, K, T, 1]."""
        import torch

        tokens_BKTD = tokens_BKTD.float()
        tiny = torch.finfo(torch.float32).tiny  # the scale of a head that is all alike
        if self.symmetric:
            scale_BKT1 = (tokens_BKTD.abs().amax(-1, keepdim=True) / 127).clamp(min=tiny)
            return (tokens_BKTD / scale_BKT1).round().clamp(-127, 127).to(torch.int8), scale_BKT1
        low_BKT1, high_BKT1 = tokens_BKTD.aminmax(dim=-1, keepdim=True)
        scale_BKT1 = ((high_BKT1 - low_BKT1) / 255).clamp(min=tiny)
        rounded_BKTD = ((tokens_BKTD - low_BKT1) / scale_BKT1).round().clamp(0, 255)
        return rounded_BKTD.to(torch.uint8), scale_BKT1, low_BKT1

    def _read(self, kept: tuple[Tensor, ...]) -> Tensor:
        integers_BKND, scale_BKN1 = kept[:2]
        values_BKND = integers_BKND.float() * scale_BKN1
        return values_BKND if self.symmetric else values_BKND + kept[2]


def _joined(kept: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    import torch

    return tuple(torch.cat(pair, 2) for pair in zip(kept, new, strict=True)) if kept else new
