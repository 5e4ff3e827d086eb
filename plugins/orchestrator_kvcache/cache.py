"""Stores as caches of Transformers. Imports Transformers: policies import it only when they are attached.

A store that attends is called in place of the model's attention function (`AttentionInterface`): `update` hands the
new keys and values through, and the attention function, which is called right after it, keeps them and attends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestrator.api import StepError
from orchestrator_kvcache.attention import Attention
from orchestrator_kvcache.policy import AttendingStore, ExtendedStore, Store

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PREFIX = "orchestrator_kvcache_"


class StoreLayer(CacheLayerMixin):  # type: ignore[misc]
    """One store, as the layer of a cache that Transformers knows."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.is_initialized = True
        self._unattended = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: stores make their tensors when they need them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new keys and values [B, K, T, D]; return what the attention function is to be given."""
        if key_states.shape[0] != 1:
            raise ValueError(f"a cache policy serves one stream at a time, not a batch of {key_states.shape[0]}")
        if isinstance(self.store, ExtendedStore):
            return self.store.extend(key_states, value_states)
        if self._unattended:
            raise RuntimeError("the cache has been taken out of the `attached` context that it was made in")
        self._unattended = True
        return key_states, value_states

    def attend(self, query_BHTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, how: Attention) -> Tensor:
        """Let the store keep the new tokens and attend; return [B, T, H, D]."""
        assert isinstance(self.store, AttendingStore)
        self._unattended = False
        return self.store.attend(query_BHTD, keys_BKTD, values_BKTD, how).transpose(1, 2).contiguous()

    def get_seq_length(self) -> int:
        """The position that the next token gets."""
        return self.store.length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that `update` will return, position of the first): read only where the model attends by itself."""
        return self.store.length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no length at which the cache ends."""
        return -1


class StoreCache(Cache):  # type: ignore[misc]
    """A cache of one store for each layer."""

    def __init__(self, stores: Sequence[Store]) -> None:
        super().__init__(layers=[StoreLayer(store) for store in stores])
        self.stores = tuple(stores)


@contextmanager
def attending(model: PreTrainedModel, cache: StoreCache) -> Iterator[None]:
    """Let the stores of `cache` attend in the model's place while the context is open."""
    before = model.config._attn_implementation
    if str(before).startswith(PREFIX):
        raise StepError("the model has another cache attached", remedy="close that one first")
    if not model._can_set_attn_implementation():
        raise StepError(
            f"{type(model).__name__} computes its attention in a way of its own, which a cache policy cannot take over",
            remedy="use a policy that leaves attention to the model: paged, int8 or fp8",
        )

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **given: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise ValueError("a cache policy serves one stream without padding: give no attention mask")
        how = Attention.of(module, scaling, given)
        return cache.layers[module.layer_idx].attend(query, key, value, how), None

    name = f"{PREFIX}{id(cache)}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
