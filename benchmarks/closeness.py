"""How close a model is to the dense one on held-out windows: the one evaluator of `benchmarks.conformance`.

Shape legend: N = windows, B = windows of a batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

BATCH = 4


@dataclass(frozen=True)
class Closeness:
    """Over all tokens but the first of each window. kl: mean KL(dense || this) of the next token, nats."""

    perplexity: float
    kl: float

    def record(self) -> dict[str, float]:
        """For the JSON file."""
        return asdict(self)


class Evaluator:
    """Keeps what the dense model says of every token of the windows."""

    def __init__(self, dense: Any, tokens_NT: torch.Tensor) -> None:
        self.tokens_NT = tokens_NT
        with torch.no_grad():
            self._dense = list(self._log_probabilities(dense.float()))
        self.dense = self(dense)

    def _log_probabilities(self, model: Any) -> Iterator[torch.Tensor]:
        """Yield ln p [B, T - 1, V] of each batch, in float32."""
        for tokens_BT in self.tokens_NT.split(BATCH):
            yield model(tokens_BT, use_cache=False).logits[:, :-1].log_softmax(-1)

    @torch.no_grad()
    def __call__(self, model: Any) -> Closeness:
        """Evaluate a model, which is turned to float32; quantized ones refuse to be asked, so must be loaded so."""
        if model.dtype != torch.float32:
            model.float()
        loss, divergence = 0.0, 0.0
        batches = zip(self._log_probabilities(model), self._dense, self.tokens_NT.split(BATCH), strict=True)
        for found_BTV, dense_BTV, tokens_BT in batches:
            loss -= float(found_BTV.gather(2, tokens_BT[:, 1:, None]).double().sum())
            divergence += float((dense_BTV.exp() * (dense_BTV - found_BTV)).double().sum())
        count = self.tokens_NT[:, 1:].numel()
        return Closeness(math.exp(loss / count), divergence / count)
