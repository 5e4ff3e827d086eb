"""A pool of blocks for keys and values, shared by the sequences of one model.

Kwon et al. 2023, arXiv:2309.06180, section 4: a sequence holds a table of blocks, wherever these lie; a block is
counted by the sequences that hold it, and copied when one of several writes into it. A full block is found again by a
hash of its tokens and, through the hash before it, of all that came before (vLLM's automatic prefix caching). Blocks
that nobody holds are kept for such finds until they are needed.

Legend: P = blocks of the pool, S = tokens of a block, K = key/value heads, D = width of a head, T = new tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROOT = b""  # the hash before the first block


def chained_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """sha256 over the hash of the block before and the token ids of this one, so equal only for equal beginnings."""
    digest = hashlib.sha256(before)
    digest.update(b"".join(token.to_bytes(8, "little", signed=True) for token in tokens))
    return digest.digest()


class BlockPool:
    """Blocks of all layers. A block's number is the same in every layer.

    keys_PSKD, values_PSKD: for each layer, one tensor of all blocks; they grow by the blocks that are asked for when
    none is free.
    """

    def __init__(self, num_layers: int, block_size: int) -> None:
        import torch

        self.num_layers = num_layers
        self.block_size = block_size
        self.keys_PSKD: list[Tensor | None] = [None] * num_layers
        self.values_PSKD: list[Tensor | None] = [None] * num_layers
        self.holders_P = torch.zeros(0, dtype=torch.int32)  # how many sequences hold each block
        self._free: dict[int, None] = {}  # in the order in which they became free
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, held or free."""
        return len(self.holders_P)

    @property
    def num_held(self) -> int:
        """Blocks that at least one sequence holds; a block that several hold counts once."""
        return self.num_blocks - len(self._free)

    def tensors(self) -> list[Tensor]:
        """All tensors of the pool."""
        return [self.holders_P, *(part for part in (*self.keys_PSKD, *self.values_PSKD) if part is not None)]

    def take(self) -> int:
        """Return a block that nobody holds, now held once: a free one if there is any, else a new one."""
        import torch

        if self._free:
            block = next(iter(self._free))
            del self._free[block]
            self._forget(block)
        else:
            block = self.num_blocks
            self.holders_P = torch.cat((self.holders_P, torch.zeros(1, dtype=torch.int32)))
        self._count(block, 1)
        return block

    def share(self, block: int) -> int:
        """Hold a block once more, also one that is free but not yet used again; return it."""
        self._free.pop(block, None)
        self._count(block, 1)
        return block

    def release(self, block: int) -> None:
        """Hold a block once less. What it keeps can be found by its hash until the block is taken."""
        self._count(block, -1)
        if self.holders_P[block] == 0:
            self._free[block] = None

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds the block."""
        return bool(self.holders_P[block] > 1)

    def copy(self, block: int) -> int:
        """Return a new block with the same content in all layers, and hold the old one once less."""
        import torch

        new = self.take()
        with torch.inference_mode():
            for parts in (self.keys_PSKD, self.values_PSKD):
                for layer, part in enumerate(parts):
                    if part is not None:
                        part = parts[layer] = self._grown(part)
                        part[new] = part[block]
        self.release(block)
        return new

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> None:
        """Put tokens into their places: token t at offsets[t] of blocks[t]."""
        import torch

        # What was made in inference mode can be changed in no other, so the pool always is in it.
        with torch.inference_mode():
            for parts, new_TKD in ((self.keys_PSKD, keys_TKD), (self.values_PSKD, values_TKD)):
                part = parts[layer]
                if part is None:
                    part = new_TKD.new_zeros((self.num_blocks, self.block_size, *new_TKD.shape[1:]))
                part = parts[layer] = self._grown(part)
                part[blocks, offsets] = new_TKD

    def read(self, layer: int, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [1, K, tokens, D] of the first tokens that the blocks hold."""
        found = []
        for part in (self.keys_PSKD[layer], self.values_PSKD[layer]):
            assert part is not None
            tokens_NKD = part.index_select(0, blocks).flatten(0, 1)[:tokens]
            found.append(tokens_NKD.transpose(0, 1).unsqueeze(0).contiguous())
        return found[0], found[1]

    def find(self, before: bytes, tokens: Sequence[int]) -> tuple[bytes, int | None]:
        """Return the hash of a full block and, if there is one, the block that holds it."""
        key = chained_hash(before, tokens)
        return key, self._by_hash.get(key)

    def enter(self, key: bytes, block: int) -> None:
        """Let a block be found by the hash of its tokens; the first of several equal ones stays."""
        if key not in self._by_hash and block not in self._hash_of:
            self._by_hash[key] = block
            self._hash_of[block] = key

    def _count(self, block: int, by: int) -> None:
        import torch

        with torch.inference_mode():
            self.holders_P[block] += by

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._by_hash[key]

    def _grown(self, part: Tensor) -> Tensor:
        import torch

        missing = self.num_blocks - len(part)
        return torch.cat((part, part.new_zeros((missing, *part.shape[1:])))) if missing > 0 else part
