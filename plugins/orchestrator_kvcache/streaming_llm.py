"""StreamingLLM: the first tokens (attention sinks) and a rolling window, at positions inside the cache.

Xiao et al. 2023, arXiv:2309.17453, section 3.2. Memory is bounded, and perplexity stays what it is within the trained
length, however long the stream. It does not lengthen the context: what has left the window is gone.

With S sinks and a window of W, token t (from 0) is at position p = min(t, S + W - 1), sink j at j, and a token that
lies d tokens back at p - d. So the largest position is S + W - 1 for ever: within the trained ones, if S + W is.

Legend: B = 1 stream, H = query heads, K = key/value heads, S = sinks, T = new tokens, N = tokens kept,
D = width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from orchestrator.api import ModelShape, SpecError, Stage
from orchestrator_kvcache.attention import Attention, softmax, weigh
from orchestrator_kvcache.policy import AttendingStore, LayerPolicy, Store
from orchestrator_kvcache.rotation import Rotation, unrotatable
from orchestrator_kvcache.storage import compact, element_bytes, elements_per_token

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from orchestrator.api import Checkpoint


class StreamingLLM(LayerPolicy):
    """Keeps the first `sinks` tokens and the last `window`. Keys are kept un-rotated and rotated at each step."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "streaming_llm"
    paper: ClassVar = "Xiao et al. 2023, arXiv:2309.17453, section 3.2."

    sinks: int = Field(4, ge=0, le=1024, description="Tokens at the start of the stream that are kept for ever.")
    window: int = Field(
        508, ge=1, le=1 << 20, description="Tokens that are kept beside the sinks, the newest among them."
    )

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        rotation = Rotation(model)
        return [SinkStore(self.sinks, self.window, rotation) for _ in range(model.config.num_hidden_layers)]

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        """Give an empty cache; while it is open the model does not rotate. `StepError` without rotary positions."""
        with super().attached(model, checkpoint) as cache, cache.stores[0].rotation.held_out():
            yield cache

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        return 2 * elements_per_token(shape) * element_bytes(shape) * min(tokens, self.sinks + self.window)

    def reach_tokens(self) -> int | None:
        return self.window - 1

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse models whose positions cannot be moved: learned ones, ALiBi, rotary ones that change with length."""
        super().check_model(config)
        reason = unrotatable(config)
        if reason:
            raise SpecError(reason, remedy="use `window`, `paged` or a quantized cache")


class SinkStore(AttendingStore):
    """Un-rotated keys, and values, of the sinks and the window of one layer."""

    def __init__(self, sinks: int, window: int, rotation: Rotation) -> None:
        self.sinks = sinks
        self.window = window
        self.rotation = rotation
        self.keys_BKND: Tensor | None = None
        self.values_BKND: Tensor | None = None
        self.tokens = 0  # that have come so far

    def length(self) -> int:
        """How many tokens are kept; the next one's position is this, or one less once the cache is full."""
        return min(self.tokens, self.sinks + self.window)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.keys_BKND, self.values_BKND) if tensor is not None]

    def attend(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        """Attend to the sinks and to the window of each new token.

        Tokens of the window keep their distances, so several new ones can share one rotation of them. The distance to
        the sinks stays while the window moves on, so towards the sinks each new token is rotated for itself.
        """
        import torch

        keys_BKND, values_BKND = keys_BKTD, values_BKTD
        if self.keys_BKND is not None and self.values_BKND is not None:
            keys_BKND = torch.cat((self.keys_BKND, keys_BKTD), 2)
            values_BKND = torch.cat((self.values_BKND, values_BKTD), 2)
        new, total, last = keys_BKTD.shape[2], keys_BKND.shape[2], self.sinks + self.window - 1
        sinks = min(self.sinks, total)
        arrivals = range(self.tokens, self.tokens + new)
        # Where each token would be if nothing of the window left during this step; sinks are where they always are.
        moved = max(0, self.tokens - last)
        ahead = tuple(arrival - moved for arrival in arrivals)
        places = tuple(range(sinks)) + tuple(range(ahead[-1] + 1 - (total - sinks), ahead[-1] + 1))
        within = tuple(min(arrival, last) for arrival in arrivals)
        turn, module = self.rotation.apply, how.module
        scores_KGTN = how.scores(turn(query_BHTD, ahead, module), turn(keys_BKND, places, module))
        if within != ahead:
            sinks_BKSD = turn(keys_BKND[:, :, :sinks], places[:sinks], module)
            scores_KGTN[..., :sinks] = how.scores(turn(query_BHTD, within, module), sinks_BKSD)
        place_N, ahead_T = torch.tensor(places), torch.tensor(ahead)
        distance_TN = ahead_T[:, None] - place_N
        in_window_TN = distance_TN < self.window
        in_window_TN[:, :sinks] = True
        distance_TN[:, :sinks] = torch.tensor(within)[:, None] - place_N[:sinks]
        seen_TN = (how.seen(distance_TN) & in_window_TN).to(keys_BKND.device)
        out_BHTD = weigh(softmax(scores_KGTN, seen_TN), values_BKND)
        self.tokens += new
        self.keys_BKND, self.values_BKND = self._kept(keys_BKND), self._kept(values_BKND)
        return out_BHTD

    def _kept(self, tokens_BKND: Tensor) -> Tensor:
        import torch

        if tokens_BKND.shape[2] <= self.sinks + self.window:
            return compact(tokens_BKND)
        return torch.cat((tokens_BKND[:, :, : self.sinks], tokens_BKND[:, :, -self.window :]), 2)
