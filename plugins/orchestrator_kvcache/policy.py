"""What the policies of this family share: one store for each layer, joined into a cache of Transformers.

Legend: B = 1 stream, H = query heads, K = key/value heads, T = new tokens, N = tokens kept, D = width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator.api import CachePolicy
from orchestrator_kvcache.storage import refuse_unserved, refuse_unserved_model, stored_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from orchestrator.api import Checkpoint
    from orchestrator_kvcache.attention import Attention


class Store(ABC):
    """What one layer keeps of its past tokens."""

    @abstractmethod
    def length(self) -> int:
        """The position that the next token will get."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that are kept between calls."""


class ExtendedStore(Store):
    """Keeps every token, in whatever form, and gives all back: the model attends to them as it always does."""

    @abstractmethod
    def extend(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens; return keys and values of all tokens [B, K, N, D], in the dtype of the new ones."""


class AttendingStore(Store):
    """Attends in the model's place, as what a token sees depends on when it came."""

    @abstractmethod
    def attend(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        """Keep the new tokens, forget what has to go, and return what attention gives [B, H, T, D]."""


class LayerPolicy(CachePolicy):
    """A policy that keeps the tokens of each layer in a store of its own."""

    @abstractmethod
    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        """Return one empty store for each layer. Raises `StepError` for a model that the policy cannot serve."""

    @contextmanager
    def attached(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Cache]:
        """Give an empty cache for one stream. See `CachePolicy.attached`."""
        from orchestrator_kvcache.cache import StoreCache, attending

        refuse_unserved_model(model)
        stores = self.stores(model, checkpoint)
        cache = StoreCache(stores)
        if all(isinstance(store, ExtendedStore) for store in stores):
            yield cache
        else:
            with attending(model, cache):
                yield cache

    def held_bytes(self, cache: Cache) -> int:
        """Bytes of all tensors that the stores keep."""
        return stored_bytes(tensor for store in cache.stores for tensor in store.tensors())

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Refuse latent attention, layers other than full and sliding attention, and layers that share a cache."""
        refuse_unserved(config)
