"""Paged KV memory: blocks, tables, reference counts, a prefix cache, copy-on-write and preemption.

PagedAttention, Kwon et al. 2023, arXiv:2309.06180, section 4; the prefix cache is that of vLLM's V1 engine: every full
block can be found by the chained hash of its tokens, blocks that nobody uses wait in one queue in the order in which
they were freed (of a sequence the last block first), and whoever needs a block takes the head of the queue, whether
something could still be found in it or not. When the queue is empty, the request that arrived last is preempted: its
blocks are freed, and it is computed again when there is room (recomputation, section 4.5).

Two things make it fast, and change no figure. Sequences wait in buckets by the phase at which their last block is full,
so a step touches only those that need a block. And a block gets its hash when somebody could first ask for it: prompts
that others may share when they are admitted, all else when it is preempted, as only itself will come back for it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import Any

from orchestrator.batching import Group, Sequence
from orchestrator.trace import Request

# Positions in the queue may be out of date; it is cleared when that is more than half of it, but not below this.
LOOSE_ENDS = 4096
POOL_TOO_SMALL = "longer than the pool"
MODEL_TOO_SMALL = "longer than max_model_len"

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

    def give(self, blocks: SequenceOf[int]) -> None:
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

    def drop(self, blocks: SequenceOf[int]) -> int:
        """Take away one reference from each, last block first. Return how many are free by that."""
        references, queue = self.references, self._queue
        freed = 0
        for block in reversed(blocks):
            left = references[block] - 1
            if left:
                references[block] = left
            else:
                del references[block]
                queue.append(block)
                freed += 1
        self.available += freed
        return freed

    def register(self, block: int, key: Key) -> None:
        """Let the block be found."""
        if block in self._key_of:
            return
        self._key_of[block] = key
        if key in self.cached:
            self._twins.setdefault(key, []).append(block)
        else:
            self.cached[key] = block

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
        blocks: list[int] = []
        while len(blocks) < count:
            block = queue[head]
            head += 1
            if block in key_of:
                if block in outdated:
                    if outdated[block] == 1:
                        del outdated[block]
                    else:
                        outdated[block] -= 1
                    continue
                self._forget(block)
            blocks.append(block)
        self._head = head
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


class PagedMemory:
    """The memory of `orchestrator.batching.Memory`, in blocks.

    watermark_blocks: a request joins only if so many blocks stay free, unless nothing else runs.
    """

    external = 0

    def __init__(
        self, num_blocks: int, block_size: int, max_model_len: int, *, watermark_blocks: int, prefix_caching: bool
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.filled = 0
        self.spare = 0
        self._max_model_len = max_model_len
        self._watermark = watermark_blocks
        self._prefix_caching = prefix_caching
        self._buckets: dict[int, dict[Sequence, list[int]]] = {}  # by phase: who needs a block next, and its `own`
        self._forks: list[Group] = []  # joined in the last step; their samples share a block that is not full
        self._final: dict[int, int] = {}  # by step: spare slots of the blocks that sequences then get as their last

    @property
    def held(self) -> int:
        """Slots in blocks that are in use."""
        return (self.pool.num_blocks - self.pool.available) * self.block_size

    def refuses(self, group: Group) -> str | None:
        """Why this request could not even run alone."""
        request = group.request
        size, prompt = self.block_size, request.prompt_tokens
        if prompt + max(request.answer_tokens) > self._max_model_len:
            return MODEL_TOO_SMALL
        if len(request.answer_tokens) == 1:
            return None  # `PagedPool` has made sure
        shared = prompt // size
        blocks = shared + sum(-(-(prompt + answer - 1) // size) - shared for answer in request.answer_tokens)
        return POOL_TOO_SMALL if blocks > self.pool.num_blocks else None

    def fit(self, group: Group, alone: bool) -> int | None:
        """Tokens to compute if the group joined now, or None if there is no room."""
        pool, size = self.pool, self.block_size
        if group.keys is None:
            group.keys = prompt_keys(group.request, size) if self._prefix_caching and group.request.prefix else ()
        prompt, generated, alive = group.request.prompt_tokens, group.generated, len(group.sequences)
        tokens = prompt + generated
        most = (tokens - 1) // size  # the last token is computed in any case: it yields the next
        if alive == 1:
            found = self._find(group, group.sequences[0].sample, 0, most)
            group.found = (found, [])
            need = -(-tokens // size) - len(found)
            tokens -= len(found) * size
        else:
            full = prompt // size
            common = -(-prompt // size) if generated == 0 else full
            found = self._find(group, -1, 0, min(full, most))
            each = [
                self._find(group, sequence.sample, full, most) if generated and len(found) == full else []
                for sequence in group.sequences
            ]
            group.found = (found, each)
            need = common - len(found)
            tokens = (prompt if generated == 0 else full * size) - len(found) * size
            if generated:
                need += alive * (-(-(prompt + generated) // size) - full)
                tokens += alive * (prompt - full * size + generated)
                for blocks in each:
                    need -= len(blocks)
                    tokens -= len(blocks) * size
                    need += sum(block not in pool.references for block in blocks)
        if found:
            references = pool.references
            for block in found:
                if block not in references:
                    need += 1
        return tokens if need + (0 if alone else self._watermark) <= pool.available else None

    def admit(self, group: Group, step: int) -> None:
        """Take the room that `fit` has just seen."""
        pool, size = self.pool, self.block_size
        found, each = group.found
        group.found = ([], [])
        alive = len(group.sequences)
        tokens = group.request.prompt_tokens + group.generated
        if found or each:
            before = pool.available
            for block in found:
                pool.share(block, alive)
            for blocks in each:
                for block in blocks:
                    pool.share(block, 1)
            self.filled += (before - pool.available) * size  # found, and used by nobody until now
        if alive == 1:
            sequence = group.sequences[0]
            blocks = pool.take(-(-tokens // size) - len(found))
            self.filled += tokens - len(found) * size
            keyed = self._register(group, len(found), blocks)
            for block in blocks[:keyed]:
                pool.references[block] = 1
            sequence.partial = False
            sequence.shared = found + blocks[:keyed]
            sequence.own = blocks[keyed:] if keyed else blocks
            self._schedule(sequence, tokens, step)
        else:
            self._admit_samples(group, found, each, step)

    def _admit_samples(self, group: Group, found: list[int], each: list[list[int]], step: int) -> None:
        """Several samples: they share the blocks of the prompt, at first also the last one if it is not full."""
        pool, size = self.pool, self.block_size
        prompt = group.request.prompt_tokens
        tokens = prompt + group.generated
        partial = group.generated == 0 and prompt % size != 0
        blocks = pool.take(prompt // size + partial - len(found))
        for block in blocks:
            pool.references[block] = len(group.sequences)
        self._register(group, len(found), blocks)
        self.filled += (prompt if partial else prompt // size * size) - len(found) * size
        for sequence, again in zip(group.sequences, each, strict=True):
            sequence.shared = found + blocks + again
            sequence.partial = partial
            if partial:
                sequence.own = []
            else:
                sequence.own = pool.take(-(-tokens // size) - len(sequence.shared))
                self.filled += tokens - len(sequence.shared) * size
            self._schedule(sequence, tokens, step)
        if partial:
            self._forks.append(group)

    def write(self, step: int, running: dict[int, Group]) -> list[Group]:
        """Give a block to everyone whose last one is full or shared; preempt who came last if there is none."""
        if step in self._final:
            self.spare += self._final.pop(step)
        bucket = self._buckets.get(step % self.block_size, {})
        if self._forks:
            forks = [sequence for group in self._forks for sequence in group.sequences]
            copies = len(forks) - sum(bool(group.sequences) for group in self._forks)  # the last writes in place
            self._forks = []
            if len(bucket) + copies > self.pool.available:
                return self._write_scarce([*bucket, *forks], step, running)
            for sequence in forks:
                self._fork(sequence)
        elif len(bucket) > self.pool.available:
            return self._write_scarce([*bucket], step, running)
        if bucket:
            for own, block in zip(bucket.values(), self.pool.take(len(bucket)), strict=True):
                own.append(block)
        return []

    def release(self, sequence: Sequence) -> None:
        """Free what a finished sequence had."""
        if sequence.final_step <= sequence.finish:
            self.spare -= -sequence.final_tokens % self.block_size
        self._free(sequence, sequence.final_tokens)

    def next_event(self, step: int) -> int | None:
        """The first step after this one in which a sequence needs a block."""
        buckets, size = self._buckets, self.block_size
        following = step + 1
        if self._forks or following % size in buckets:
            return following
        return following + min((phase - following) % size for phase in buckets) if buckets else None

    def _write_scarce(self, needing: list[Sequence], step: int, running: dict[int, Group]) -> list[Group]:
        """As `write`, one by one in order of arrival, while blocks last; then at the cost of the latest."""
        pool = self.pool
        victims: list[Group] = []
        for sequence in sorted(needing, key=lambda one: (one.group.serial, one.sample)):
            group = sequence.group
            if group.serial not in running:
                continue
            if sequence.partial and pool.references[sequence.shared[-1]] == 1:
                self._fork(sequence)
                continue
            while pool.available == 0:
                _, victim = running.popitem()  # who joined last; that is also who arrived last
                self._preempt(victim, step)
                victims.append(victim)
                if victim is group:
                    break
            else:
                if sequence.partial:
                    self._fork(sequence)
                else:
                    sequence.own += pool.take(1)
        return victims

    def _fork(self, sequence: Sequence) -> None:
        """Copy the shared last block on the first write to it; who is alone with it keeps it."""
        references = self.pool.references
        block = sequence.shared.pop()
        sequence.partial = False
        if references[block] == 1:
            del references[block]
            sequence.own.append(block)
        else:
            references[block] -= 1
            sequence.own += self.pool.take(1)
            self.filled += sequence.group.request.prompt_tokens % self.block_size

    def _preempt(self, group: Group, step: int) -> None:
        written = group.request.prompt_tokens + group.generated + step - group.admitted - 1
        for sequence in group.sequences:
            if self._prefix_caching:
                full = (sequence.shared + sequence.own)[: written // self.block_size]
                self._register(group, 0, full, sequence.sample)
            spare = -sequence.final_tokens % self.block_size
            if sequence.final_step <= step:
                self.spare -= spare
            else:
                self._final[sequence.final_step] -= spare
            self._free(sequence, written)

    def _free(self, sequence: Sequence, tokens: int) -> None:
        """Free the blocks of a sequence that has so many tokens, the last block first."""
        pool, size = self.pool, self.block_size
        bucket = self._buckets[sequence.phase]
        del bucket[sequence]
        if not bucket:
            del self._buckets[sequence.phase]
        if sequence.partial:
            last = sequence.shared[-1]
            self.filled -= pool.drop(sequence.shared) * size
            if last not in pool.references:
                self.filled += size - sequence.group.request.prompt_tokens % size
        else:
            self.filled -= tokens - len(sequence.shared) * size
            sequence.own.reverse()
            pool.give(sequence.own)
            if sequence.shared:
                self.filled -= pool.drop(sequence.shared) * size

    def _schedule(self, sequence: Sequence, tokens: int, step: int) -> None:
        """Note when a sequence that has just joined will need blocks, and when it gets the last one."""
        size = self.block_size
        phase = sequence.phase = (step + 1 - tokens) % size
        bucket = self._buckets.get(phase)
        if bucket is None:
            self._buckets[phase] = {sequence: sequence.own}
        else:
            bucket[sequence] = sequence.own
        final_tokens = sequence.final_tokens
        final_step = sequence.finish - (final_tokens - 1) % size
        if sequence.partial and final_step <= step:
            final_step = step + 1  # not before it has a block of its own; nobody's spare slots are counted twice
            if sequence.finish == step:
                sequence.final_step = final_step
                return
        sequence.final_step = final_step
        spare = -final_tokens % size
        if final_step <= step:
            self.spare += spare
        else:
            self._final[final_step] = self._final.get(final_step, 0) + spare

    def _find(self, group: Group, sample: int, first: int, last: int) -> list[int]:
        """Cached blocks of the table's places first to last - 1, up to the first that is not cached."""
        cached = self.pool.cached
        found: list[int] = []
        if not group.generated:
            for key in (group.keys or ())[first:last]:
                block = cached.get(key)
                if block is None:
                    break
                found.append(block)
            return found
        for place in range(first, last):
            block = cached.get(self._key(group, sample, place))
            if block is None:
                break
            found.append(block)
        return found

    def _register(self, group: Group, first: int, blocks: list[int], sample: int | None = None) -> int:
        """Let full blocks from place `first` on be found: those others may ask for, or all. Return how many."""
        keys = group.keys or ()
        count = len(blocks) if sample is not None else max(0, min(len(keys) - first, len(blocks)))
        for offset in range(count):
            self.pool.register(blocks[offset], self._key(group, sample or 0, first + offset))
        return count

    def _key(self, group: Group, sample: int, place: int) -> Key:
        keys = group.keys or ()
        if place < len(keys):
            return keys[place]
        in_prompt = place < group.request.prompt_tokens // self.block_size
        return group.serial, -1 if in_prompt else sample, place


def prompt_keys(request: Request, block_size: int) -> tuple[int, ...]:
    """Return a name for each full block of the prompt that lies in named text; equal names, equal text up to there."""
    named = min(request.prompt_tokens, len(request.prefix) * request.chunk_tokens)
    return _chain(request.prefix, request.chunk_tokens, named // block_size, block_size)


@lru_cache(maxsize=1024)
def _chain(prefix: tuple[int, ...], chunk_tokens: int, blocks: int, block_size: int) -> tuple[int, ...]:
    chain = chunk_tokens
    chunk = 0
    keys = []
    for place in range(blocks):
        end = (place + 1) * block_size
        while chunk * chunk_tokens < end:
            chain = hash((chain, prefix[chunk]))
            chunk += 1
        keys.append(hash((chain, place)))
    return tuple(keys)
