"""Attention over what a layer has kept, where that is more than one mask over one tensor can say.

Legend: B = 1 stream, H = query heads, K = key/value heads, G = query heads of one key/value head (H = K * G),
T = new tokens, N = tokens attended to, D = width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.api import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

# What Transformers hands to an attention function that changes its result. Others carry flags or say how to mask.
_UNSERVED = {"s_aux": "learned attention sinks", "position_bias": "position biases", "head_mask": "head masks"}


@dataclass(frozen=True)
class Attention:
    """How a layer attends.

    module: the attention module. scaling: of the scores. window: the layer's own sliding window in tokens, or None.
    softcap: scores become softcap * tanh(score / softcap).
    """

    module: nn.Module
    scaling: float
    window: int | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, module: nn.Module, scaling: float | None, given: Mapping[str, Any]) -> Attention:
        """Read what a model hands to its attention function. Raises `StepError` for what is not served."""
        for name, what in _UNSERVED.items():
            if given.get(name) is not None:
                raise StepError(
                    f"{type(module).__name__} attends with {what} ({name}), which this cache policy cannot serve",
                    remedy="use a policy that leaves attention to the model: paged, int8 or fp8",
                )
        if scaling is None:
            scaling = float(module.head_dim) ** -0.5  # type: ignore[arg-type]
        return cls(module, scaling, given.get("sliding_window"), given.get("softcap"))

    def scores(self, query_BHTD: Tensor, keys_BKND: Tensor) -> Tensor:
        """Return scores [K, G, T, N] in float32 (float64 for a float64 model), before any mask."""
        import torch

        query_KGTD = query_BHTD[0].reshape(keys_BKND.shape[1], -1, *query_BHTD.shape[2:])
        scores_KGTN = (query_KGTD @ keys_BKND[0].unsqueeze(1).transpose(-1, -2)) * self.scaling
        if self.softcap is not None:
            scores_KGTN = torch.tanh(scores_KGTN / self.softcap) * self.softcap
        return scores_KGTN.to(torch.promote_types(scores_KGTN.dtype, torch.float32))

    def seen(self, distance: Tensor) -> Tensor:
        """Return which of the tokens that lie `distance` tokens back are seen: none ahead, none beyond the window."""
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


def softmax(scores_KGTN: Tensor, seen_TN: Tensor) -> Tensor:
    """Return the attention probabilities of scores where `seen` (broadcast) holds; 0 elsewhere."""
    return scores_KGTN.masked_fill(~seen_TN, float("-inf")).softmax(-1)


def weigh(probabilities_KGTN: Tensor, values_BKND: Tensor) -> Tensor:
    """Return the values under their probabilities, [B, H, T, D] in the values' dtype."""
    out_KGTD = probabilities_KGTN.to(values_BKND.dtype) @ values_BKND[0].unsqueeze(1)
    return out_KGTD.flatten(0, 1).unsqueeze(0)
