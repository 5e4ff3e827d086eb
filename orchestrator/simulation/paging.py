"""Paged KV memory: block tables, shared prefixes, copy-on-write and preemption.

PagedAttention, Kwon et al. 2023, arXiv:2309.06180, section 4, on the pool of `block_pool`. When the pool
is empty, the request that arrived last is preempted: its blocks are freed, and it is computed again when there is room
(recomputation, section 4.5), except for what is still in the cache then.

Two things make it fast, and change no figure. Sequences wait in buckets by the phase at which their last block is full,
so a step touches only those that need a block. And a block gets its hash when somebody could first ask for it: prompts
that others may share when they are admitted, all else when it is preempted, as only itself will come back for it.
"""

from __future__ import annotations

from orchestrator.simulation.batching import Group, Sequence
from orchestrator.simulation.block_pool import BlockPool, Key, prompt_keys

POOL_TOO_SMALL = "longer than the pool"
MODEL_TOO_SMALL = "longer than max_model_len"


class PagedMemory:
    """The memory of `batching.Memory`, in blocks.

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
            if keyed:
                pool.refer(blocks[:keyed], 1)
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
        pool.refer(blocks, len(group.sequences))
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
                self.pool.register(full, [self._key(group, sequence.sample, place) for place in range(len(full))])
            spare = -sequence.final_tokens % self.block_size
            if sequence.final_step <= step:
                self.spare -= spare
            elif self._final.get(sequence.final_step) == spare:
                del self._final[sequence.final_step]  # `write` may never come to this step
            elif spare:
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
        elif spare:
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

    def _register(self, group: Group, first: int, blocks: list[int]) -> int:
        """Let new blocks of the prompt, from place `first` on, be found by who shares the text. Return how many can."""
        keys = (group.keys or ())[first : first + len(blocks)]
        if keys:
            self.pool.register(blocks[: len(keys)], keys)
        return len(keys)

    def _key(self, group: Group, sample: int, place: int) -> Key:
        keys = group.keys or ()
        if place < len(keys):
            return keys[place]
        in_prompt = place < group.request.prompt_tokens // self.block_size
        return group.serial, -1 if in_prompt else sample, place
