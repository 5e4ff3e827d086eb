"""paged: keys and values in blocks of a pool, found through a table; nothing is lost.

Kwon et al. 2023, arXiv:2309.06180. The model attends to the same numbers as with a contiguous cache, so logits are
equal bit for bit. Several sequences of one pool share the blocks of equal beginnings:

    pool = BlockPool(num_layers, block_size)
    first = PagedSequence.starting_with(pool, prompt)   # first.cache() is what the model takes as past_key_values
    second = PagedSequence.starting_with(pool, other)   # once the first is read; the model reads other[second.tokens:]
    third = first.fork()                                # goes on from where the first one is

Legend: K = key/value heads, D = width of a head, T = new tokens, N = tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field

from orchestrator.api import ModelShape, Stage
from orchestrator_kvcache.block_pool import BlockPool
from orchestrator_kvcache.policy import ExtendedStore, LayerPolicy, Store
from orchestrator_kvcache.storage import element_bytes, elements_per_token

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from orchestrator.api import Checkpoint
    from orchestrator_kvcache.cache import StoreCache

_NUMBER_BYTES = 4  # int32: a block's number in a table, and the count of those that hold it


class Paged(LayerPolicy):
    """Keeps everything, in blocks of `block_size` tokens."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "paged"
    paper: ClassVar = "Kwon et al. 2023, arXiv:2309.06180, section 4."

    block_size: int = Field(16, ge=1, le=1 << 16, description="Tokens of a block.")

    def stores(self, model: PreTrainedModel, checkpoint: Checkpoint) -> Sequence[Store]:
        return PagedSequence(BlockPool(model.config.num_hidden_layers, self.block_size)).stores()

    def planned_bytes(self, shape: ModelShape, tokens: int) -> int:
        blocks = -(-tokens // self.block_size)
        block = 2 * elements_per_token(shape) * element_bytes(shape) * self.block_size
        return blocks * (block + 2 * _NUMBER_BYTES)


class PagedSequence:
    """One sequence of a pool: its table of blocks, and the tokens that it is known to hold.

    table: the number of each block, in the order of the sequence. tokens: how many tokens all layers hold.
    """

    def __init__(self, pool: BlockPool) -> None:
        import torch

        self.pool = pool
        self.table = torch.zeros(0, dtype=torch.int32)
        self.tokens = 0
        self._written = [0] * pool.num_layers
        self._ids: list[int] = []  # of the first tokens, as far as they have been announced
        self._hashes: list[bytes] = []  # of the full blocks that are entered

    @classmethod
    def starting_with(cls, pool: BlockPool, tokens: Sequence[int]) -> Self:
        """Open a sequence on the longest beginning of `tokens` that the pool holds in full blocks.

        At least one token is left to be read, as its logits are wanted: read ``tokens[sequence.tokens:]``.
        """
        sequence = cls(pool)
        found: list[int] = []
        for start in range(0, len(tokens) - pool.block_size, pool.block_size):
            key, block = pool.find(sequence._before(), tokens[start : start + pool.block_size])
            if block is None:
                break
            found.append(pool.share(block))
            sequence._hashes.append(key)
        sequence._set_table(found)
        sequence.tokens = len(found) * pool.block_size
        sequence._written = [sequence.tokens] * pool.num_layers
        sequence._ids = list(tokens)
        return sequence

    def announce(self, tokens: Sequence[int]) -> None:
        """Name the tokens that come next, so that their blocks can be shared. Blocks of unnamed tokens are not."""
        if len(self._ids) < self.tokens:
            raise ValueError(f"{self.tokens - len(self._ids)} tokens before these were never announced")
        self._ids += tokens

    def fork(self) -> PagedSequence:
        """A second sequence with the same past. All blocks are shared; one that both write into is copied first."""
        twin = PagedSequence(self.pool)
        twin._set_table([self.pool.share(block) for block in self.table.tolist()])
        twin.tokens, twin._written = self.tokens, list(self._written)
        twin._ids, twin._hashes = self._ids[: self.tokens], list(self._hashes)
        return twin

    def close(self) -> None:
        """Give the blocks back. Those with a name can be found again until the pool needs them."""
        for block in reversed(self.table.tolist()):  # the last go first: beginnings are found more often
            self.pool.release(block)
        self._set_table([])
        self.tokens, self._written, self._ids, self._hashes = 0, [0] * self.pool.num_layers, [], []

    def stores(self) -> list[Store]:
        """One store for each layer."""
        return [PagedStore(self, layer) for layer in range(self.pool.num_layers)]

    def cache(self) -> StoreCache:
        """The sequence as a cache of Transformers."""
        from orchestrator_kvcache.cache import StoreCache

        return StoreCache(self.stores())

    def written(self, layer: int) -> int:
        """How many tokens a layer holds: in the midst of a step the first layers are ahead."""
        return self._written[layer]

    def extend(self, layer: int, keys_TKD: Tensor, values_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens of one layer; return keys and values [1, K, N, D] of all its tokens."""
        import torch

        start, stop = self._written[layer], self._written[layer] + len(keys_TKD)
        self._make_room(start, stop)
        place = torch.arange(start, stop)
        table = self.table.to(keys_TKD.device)
        place = place.to(keys_TKD.device)
        size = self.pool.block_size
        self.pool.write(layer, table[place // size], place % size, keys_TKD, values_TKD)
        self._written[layer] = stop
        if min(self._written) == stop:
            self.tokens = stop
            self._enter_full_blocks()
        return self.pool.read(layer, table, stop)

    def _make_room(self, start: int, stop: int) -> None:
        """Hold blocks for all tokens up to `stop`, and alone those that tokens from `start` on go to."""
        blocks = self.table.tolist()
        first = start // self.pool.block_size
        for place in range(first, len(blocks)):
            if self.pool.is_shared(blocks[place]):
                blocks[place] = self.pool.copy(blocks[place])
        missing = -(-stop // self.pool.block_size) - len(blocks)
        blocks += [self.pool.take() for _ in range(missing)]
        self._set_table(blocks)

    def _enter_full_blocks(self) -> None:
        size = self.pool.block_size
        for place in range(len(self._hashes), min(self.tokens, len(self._ids)) // size):
            key, _ = self.pool.find(self._before(), self._ids[place * size : (place + 1) * size])
            self.pool.enter(key, int(self.table[place]))
            self._hashes.append(key)

    def _before(self) -> bytes:
        return self._hashes[-1] if self._hashes else b""

    def _set_table(self, blocks: list[int]) -> None:
        import torch

        if blocks != self.table.tolist():
            self.table = torch.tensor(blocks, dtype=torch.int32)


class PagedStore(ExtendedStore):
    """One layer of a sequence."""

    def __init__(self, sequence: PagedSequence, layer: int) -> None:
        self.sequence = sequence
        self.layer = layer

    def length(self) -> int:
        return self.sequence.written(self.layer)

    def tensors(self) -> list[Tensor]:
        """Those of the whole pool, and the table: layers share both."""
        return [*self.sequence.pool.tensors(), self.sequence.table]

    def extend(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.sequence.extend(self.layer, keys_BKTD[0].transpose(0, 1), values_BKTD[0].transpose(0, 1))
