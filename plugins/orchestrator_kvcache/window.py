"""window: only the last tokens, at their own positions. The baseline that StreamingLLM is measured against.

Once the first tokens have left, a model that has put its attention there loses its way, and positions go on beyond
those it was trained on: its perplexity explodes (arXiv:2309.17453, figure 3).

Legend: B = 1 stream, H = query heads, K = key/value heads, T = new tokens, N = tokens kept, D = width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import ModelShape, Stage
from orchestrator_kvcache.attention import Attention, softmax, weigh
from orchestrator_kvcache.policy import AttendingStore, LayerPolicy, Store
from orchestrator_kvcache.storage import compact, element_bytes, elements_per_token

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from orchestrator.api import Checkpoint


class Window(LayerPolicy):
    """Keeps the last `window` tokens; a token sees itself and those before it in the window."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "window"
    paper: ClassVar = "Beltagy et al. 2020, arXiv:2004.05150; as the baseline of arXiv:2309.17453."

    window: int = Field(512, ge=1, le=1 << 20, description="Tokens that are kept, the newest among them.")

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        return [WindowStore(self.window) for _ in range(model.config.num_hidden_layers)]

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        return 2 * elements_per_token(shape) * element_bytes(shape) * min(tokens, self.window)

    def reach_tokens(self) -> int | None:
        return self.window - 1


class WindowStore(AttendingStore):
    """The last keys and values of one layer."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.keys_BKND: Tensor | None = None
        self.values_BKND: Tensor | None = None
        self.tokens = 0  # that have come so far

    def length(self) -> int:
        return self.tokens

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.keys_BKND, self.values_BKND) if tensor is not None]

    def attend(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        """Attend within the window of each new token, so that several at once see what each would see alone."""
        import torch

        keys_BKND, values_BKND = keys_BKTD, values_BKTD
        if self.keys_BKND is not None and self.values_BKND is not None:
            keys_BKND = torch.cat((self.keys_BKND, keys_BKTD), 2)
            values_BKND = torch.cat((self.values_BKND, values_BKTD), 2)
        new, total = keys_BKTD.shape[2], keys_BKND.shape[2]
        place_N = torch.arange(total, device=keys_BKND.device)
        distance_TN = place_N[total - new :, None] - place_N
        seen_TN = how.seen(distance_TN) & (distance_TN < self.window)
        out_BHTD = weigh(softmax(how.scores(query_BHTD, keys_BKND), seen_TN), values_BKND)
        self.keys_BKND = compact(keys_BKND[:, :, -self.window :])
        self.values_BKND = compact(values_BKND[:, :, -self.window :])
        self.tokens += new
        return out_BHTD
