"""H2O: the tokens that have drawn most attention so far (heavy hitters), and the most recent ones.

Zhang et al. 2023, arXiv:2306.14048, section 4. Each key/value head of each layer has tokens of its own. A token's score
is the sum of the attention that all later tokens, and itself, have paid to it, summed over the query heads that share
the key/value head. Tokens stay at the positions they had in the stream.

The first call is the prompt: its tokens attend to all before them, then all but the budget is forgotten. After it,
each token is attended, scored and followed by its own eviction, also where several come at once.

Legend: B = 1 stream, H = query heads, K = key/value heads, G = query heads of one key/value head, T = new tokens,
N = tokens kept, D = width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from orchestrator.api import ModelShape, Stage
from orchestrator_kvcache.attention import Attention, softmax, weigh
from orchestrator_kvcache.policy import AttendingStore, LayerPolicy, Store
from orchestrator_kvcache.storage import compact, element_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from orchestrator.api import Checkpoint

_SCORE_BYTES = 4  # float32
_POSITION_BYTES = 4  # int32


class H2O(LayerPolicy):
    """Keeps `heavy` heavy hitters and the last `recent` tokens, for each layer and key/value head."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "h2o"
    paper: ClassVar = "Zhang et al. 2023, arXiv:2306.14048, section 4, algorithm 1."

    heavy: int = Field(256, ge=0, le=1 << 20, description="Tokens kept for the attention that they have drawn.")
    recent: int = Field(256, ge=1, le=1 << 20, description="Most recent tokens, kept whatever they draw.")

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        return [HeavyHitterStore(self.heavy, self.recent) for _ in range(model.config.num_hidden_layers)]

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        kept = min(tokens, self.heavy + self.recent)
        entry = 2 * shape.head_dim * element_bytes(shape) + _SCORE_BYTES + _POSITION_BYTES
        return shape.num_layers * shape.num_kv_heads * kept * entry


class HeavyHitterStore(AttendingStore):
    """Keys, values, scores and positions of the tokens that each key/value head of one layer keeps, oldest first."""

    def __init__(self, heavy: int, recent: int) -> None:
        self.heavy = heavy
        self.recent = recent
        self.keys_BKND: Tensor | None = None
        self.values_BKND: Tensor | None = None
        self.score_KN: Tensor | None = None  # attention drawn so far
        self.position_KN: Tensor | None = None  # in the stream
        self.tokens = 0  # that have come so far

    def length(self) -> int:
        return self.tokens

    def tensors(self) -> list[Tensor]:
        kept = (self.keys_BKND, self.values_BKND, self.score_KN, self.position_KN)
        return [tensor for tensor in kept if tensor is not None]

    def attend(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        """Attend to what is kept and to the new tokens up to each; one by one wherever something has to go."""
        import torch

        budget = self.heavy + self.recent
        new = keys_BKTD.shape[2]
        together = new if self.tokens == 0 else max(0, min(new, budget - self.tokens))
        pieces = [together] if together else []
        pieces += [1] * (new - together)
        queries, keys, values = (torch.split(tensor, pieces, 2) for tensor in (query_BHTD, keys_BKTD, values_BKTD))
        return torch.cat([self._step(*part, how) for part in zip(queries, keys, values, strict=True)], 2)

    def _step(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        import torch

        new = keys_BKTD.shape[2]
        arrival_T = torch.arange(self.tokens, self.tokens + new, dtype=torch.int32, device=keys_BKTD.device)
        position_KN = arrival_T.expand(keys_BKTD.shape[1], new)
        score_KN = torch.zeros(position_KN.shape, device=keys_BKTD.device)
        keys_BKND, values_BKND = keys_BKTD, values_BKTD
        if self.keys_BKND is not None and self.values_BKND is not None:
            assert self.score_KN is not None and self.position_KN is not None
            keys_BKND = torch.cat((self.keys_BKND, keys_BKTD), 2)
            values_BKND = torch.cat((self.values_BKND, values_BKTD), 2)
            position_KN = torch.cat((self.position_KN, position_KN), 1)
            score_KN = torch.cat((self.score_KN, score_KN), 1)
        seen_KGTN = how.seen(arrival_T[:, None] - position_KN[:, None, None])
        probabilities_KGTN = softmax(how.scores(query_BHTD, keys_BKND), seen_KGTN)
        score_KN = score_KN + probabilities_KGTN.sum((1, 2)).float()
        out_BHTD = weigh(probabilities_KGTN, values_BKND)
        self.tokens += new
        self._keep(keys_BKND, values_BKND, score_KN, position_KN)
        return out_BHTD

    def _keep(self, keys_BKND: Tensor, values_BKND: Tensor, score_KN: Tensor, position_KN: Tensor) -> None:
        """Keep the heaviest of all but the recent tokens, and the recent ones, in the order of the stream."""
        import torch

        old = score_KN.shape[1] - self.recent
        if old > self.heavy:
            heaviest_KN = score_KN[:, :old].topk(self.heavy, 1).indices.sort(1).values
            recent_N = torch.arange(old, old + self.recent, device=score_KN.device)
            kept_KN = torch.cat((heaviest_KN, recent_N.expand(len(score_KN), -1)), 1)
            kept_BKND = kept_KN[None, :, :, None].expand(1, -1, -1, keys_BKND.shape[-1])
            keys_BKND, values_BKND = keys_BKND.gather(2, kept_BKND), values_BKND.gather(2, kept_BKND)
            score_KN, position_KN = score_KN.gather(1, kept_KN), position_KN.gather(1, kept_KN)
        self.keys_BKND, self.values_BKND = compact(keys_BKND), compact(values_BKND)
        self.score_KN, self.position_KN = compact(score_KN), compact(position_KN)
