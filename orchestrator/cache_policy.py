"""The method kind `CachePolicy`: how keys and values of past tokens are kept while a model reads and writes.

A policy is a real cache of Transformers, so that what it costs can be measured on the compressed model itself (validate
step with `policy:`). Imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from orchestrator.method import Method
from orchestrator.serving import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from orchestrator.checkpoint import Checkpoint


class CachePolicy(Method):
    """Keeps, forgets or compresses the keys and values of past tokens. Stage validate.

    It is listed under ``policy:`` of a validate step: ``policy: {streaming_llm: {sinks: 4, window: 508}}``.
    """

    @abstractmethod
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> AbstractContextManager[Cache]:
        """A fresh, empty cache for one stream (batch 1), to be given as `past_key_values`.

        Tokens may come one by one or several at once, with the same result: each sees what it would have seen had it
        come alone. Only the first call, the prompt, may be read whole before anything of it is forgotten. Positions are
        the cache's business: give no `position_ids`. Whatever the model itself needs for the cache (another attention
        function) is there while the context is open, and undone when it closes; one cache at a time for a model.
        checkpoint: what the model was loaded from; calibrated scales are read from it. Raises `StepError` for a model
        whose attention the policy cannot serve.
        """

    @abstractmethod
    def held_bytes(self, cache: Cache) -> int:
        """Bytes that the cache's tensors take now: keys, values, scales, scores, tables."""

    @abstractmethod
    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        """Bytes that `held_bytes` will be after a stream of `tokens` tokens, calculated from the shape alone.

        shape: of the model, in the dtype that it computes in.
        """

    def reach_tokens(self) -> int | None:
        """How many tokens back, at most, a token can attend to beside the first ones; None: to all."""
        return None

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse, while planning, a model that `attached` would refuse, as far as config.json shows. `SpecError`."""
