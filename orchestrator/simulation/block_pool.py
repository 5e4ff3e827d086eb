"""A pool of KV blocks: one queue of free blocks, reference counts, and the prefix cache.

As vLLM's V1 engine keeps it: every full block can be found by the chained hash of its tokens; blocks that nobody uses
wait in one queue in the order in which they were freed (of a sequence the last block first), and whoever needs a block
takes the head of the queue, whether something could still be found in it or not. That is eviction of the least recently
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from orchestrator.simulation.trace import Request

# Entries of the queue may be out of date; it is tidied when that is more than half of it, but not below this.
LOOSE_ENDS = 4096

Key = Any  # of a block: an int (text that others may share), or a tuple (one's own)


class BlockPool:
    """Numbered blocks. `available` are in the queue; of the others, those that several can reach count references."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.available = num_blocks
        self.references: dict[int, int] = {}
        self.cached: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._twins: dict[Key, list[int]] = {}  # further blocks with the same content
        self._queue = list(range(num_blocks))
        self._head = 0
        self._outdated: dict[int, int] = {}  # how many entries of a block in the queue do not count

    def take(self, count: int) -> list[int]:
        """Take blocks from the head of the queue; what could be found in them no longer can. Needs `available`."""
        if count > self.available:
            raise RuntimeError(f"{count} blocks wanted, {self.available} available")
        self.available -= count
        start = self._head
        blocks = self._queue[start : start + count]
        if self._key_of.keys().isdisjoint(blocks):  # then no entry is outdated either
            self._head = start + count
        else:
            blocks = self._take_cached(count)
        if self._head > LOOSE_ENDS and self._head > len(self._queue) >> 1:
            del self._queue[: self._head]
            self._head = 0
        return blocks

    def give(self, blocks: Sequence[int]) -> None:
        """Return blocks that nobody else can reach; the first of them will be taken first."""
        self._queue += blocks
        self.available += len(blocks)

    def share(self, block: int, count: int) -> None:
        """Add references to a block that was found in the cache; it may be in the queue."""
        references = self.references
        if block in references:
            references[block] += count
        else:
            references[block] = count
            self.available -= 1
            self._outdated[block] = self._outdated.get(block, 0) + 1
            if len(self._queue) - self._head > 2 * self.available + LOOSE_ENDS:
                self._tidy()

    def drop(self, blocks: list[int]) -> int:
        """Take away one reference from each, last block first. Return how many are free by that."""
        references = self.references
        counts = [*map(references.pop, blocks)]
        freed = counts.count(1)
        others = len(counts) - freed
        if 1 in counts[:others]:
            alone = [block for block, count in zip(blocks, counts, strict=True) if count == 1]
            others = len(counts)
        else:  # mostly: whoever has a block has those before it
            alone = blocks[others:]
        for place in range(others):
            if counts[place] > 1:
                references[blocks[place]] = counts[place] - 1
        self._queue += alone[::-1]
        self.available += freed
        return freed

    def refer(self, blocks: Sequence[int], count: int) -> None:
        """Count references to blocks that were just taken."""
        self.references.update(dict.fromkeys(blocks, count))

    def register(self, blocks: Sequence[int], keys: Sequence[Key]) -> None:
        """Let the blocks be found by these keys, unless they are found by others already."""
        key_of, cached = self._key_of, self.cached
        if key_of.keys().isdisjoint(blocks) and cached.keys().isdisjoint(keys):
            key_of.update(zip(blocks, keys, strict=True))
            cached.update(zip(keys, blocks, strict=True))
            return
        for block, key in zip(blocks, keys, strict=True):
            if block in key_of:
                continue
            key_of[block] = key
            if key in cached:
                self._twins.setdefault(key, []).append(block)
            else:
                cached[key] = block

    def queued(self) -> list[int]:
        """The blocks in the queue, head first."""
        outdated = dict(self._outdated)
        kept = []
        for block in self._queue[self._head :]:
            if outdated.get(block):
                outdated[block] -= 1
            else:
                kept.append(block)
        return kept

    def _take_cached(self, count: int) -> list[int]:
        queue, key_of, outdated, head = self._queue, self._key_of, self._outdated, self._head
        blocks = queue[head : head + count]
        head += count
        if not outdated.keys().isdisjoint(blocks):
            head -= count
            blocks = []
            while len(blocks) < count:
                block = queue[head]
                head += 1
                if block not in outdated:
                    blocks.append(block)
                elif outdated[block] == 1:
                    del outdated[block]
                else:
                    outdated[block] -= 1
        self._head = head
        for block in blocks:
            if block in key_of:
                if self._twins:
                    self._forget(block)
                else:
                    del self.cached[key_of.pop(block)]
        return blocks

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block)
        twins = self._twins.get(key)
        if self.cached[key] != block:
            assert twins is not None
            twins.remove(block)
        elif twins:
            self.cached[key] = twins.pop(0)
        else:
            del self.cached[key]
        if twins is not None and not twins:
            del self._twins[key]

    def _tidy(self) -> None:
        self._queue = self.queued()
        self._head = 0
        self._outdated.clear()


def prompt_keys(request: Request, block_size: int) -> tuple[int, ...]:
    """Return a name for each full block of the prompt that lies in named text; equal names, equal text up to there."""
    named = min(request.prompt_tokens, len(request.prefix) * request.chunk_tokens)
    return _chain(request.prefix, request.chunk_tokens, named // block_size, block_size)


@lru_cache(maxsize=128)
def _chain(prefix: tuple[int, ...], chunk_tokens: int, blocks: int, block_size: int) -> tuple[int, ...]:
    chain = chunk_tokens
    keys: list[int] = []
    for chunk, name in enumerate(prefix):
        # The blocks that end in this chunk. Two chains are 64-bit hashes, so their ranges practically never meet.
        chain = hash((chain, name))
        end = min(blocks, (chunk + 1) * chunk_tokens // block_size)
        keys += range(chain + len(keys), chain + end)
        if end == blocks:
            break
    return tuple(keys)
