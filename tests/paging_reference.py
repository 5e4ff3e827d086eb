"""The simulator written plainly and slowly, from the same papers: token by token, every step, with real content.

Nothing is shared with `orchestrator` but `Request`. A block holds the identities of its tokens, and what is in the
prefix cache is found by comparing them; free memory is a plain list; contiguous memory is an array of owners.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from orchestrator.simulation.trace import Request

Content = tuple[Any, ...]


@dataclass
class Sample:
    """One answer in the making. `written` tokens of prompt and answer are in memory, `blocks` is its table."""

    number: int
    answer: int
    written: int = 0
    blocks: list[int] = field(default_factory=list)
    piece: tuple[int, int] = (0, 0)


@dataclass
class Job:
    """A request and its unfinished samples, all of which have yielded `yielded` tokens."""

    serial: int
    request: Request
    samples: list[Sample]
    yielded: int = 0

    def token(self, sample: int, position: int) -> Content:
        """The identity of a token: equal for two sequences only if the text is the same."""
        request = self.request
        if position >= request.prompt_tokens:
            return ("answer", self.serial, sample, position)
        if request.prefix and position // request.chunk_tokens < len(request.prefix):
            return ("named", request.prefix[position // request.chunk_tokens], position % request.chunk_tokens)
        return ("prompt", self.serial, position)


class ReferencePages:
    """Blocks with content and reference counts; every full block can be found, as in vLLM."""

    def __init__(self, blocks: int, size: int, *, watermark: int, caching: bool) -> None:
        self.size, self.watermark, self.caching = size, watermark, caching
        self.content: list[list[Content]] = [[] for _ in range(blocks)]
        self.count = [0] * blocks
        self.free = list(range(blocks))
        self.known: dict[Content, list[int]] = {}  # whole text up to the end of a full block: where it is
        self.text_of: dict[int, Content] = {}

    def text(self, job: Job, sample: int, end: int) -> Content:
        return tuple(job.token(sample, position) for position in range(end))

    def take(self) -> int:
        block = self.free.pop(0)
        assert self.count[block] == 0
        if block in self.text_of:
            text = self.text_of.pop(block)
            self.known[text].remove(block)
            if not self.known[text]:
                del self.known[text]
        self.content[block] = []
        self.count[block] = 1
        return block

    def drop(self, block: int) -> None:
        self.count[block] -= 1
        assert self.count[block] >= 0
        if self.count[block] == 0:
            self.free.append(block)

    def append(self, job: Job, sample: Sample) -> None:
        """Write the next token; the place must be there."""
        block = sample.blocks[sample.written // self.size]
        assert self.count[block] == 1
        assert len(self.content[block]) == sample.written % self.size
        self.content[block].append(job.token(sample.number, sample.written))
        sample.written += 1
        self.remember(job, sample, block)

    def remember(self, job: Job, sample: Sample, block: int) -> None:
        if self.caching and len(self.content[block]) == self.size and block not in self.text_of:
            text = self.text(job, sample.number, (sample.blocks.index(block) + 1) * self.size)
            self.text_of[block] = text
            self.known.setdefault(text, []).append(block)

    def find(self, job: Job, sample: Sample) -> list[int]:
        """The longest run of cached blocks at the start of a sequence, not with its last token."""
        found: list[int] = []
        length = job.request.prompt_tokens + job.yielded
        while self.caching and (len(found) + 1) * self.size <= length - 1:
            places = self.known.get(self.text(job, sample.number, (len(found) + 1) * self.size))
            if not places:
                break
            found.append(places[0])
        return found

    def join(self, job: Job, alone: bool) -> int | None:
        """Admit if there is room. Return the tokens to compute, or None if there is none."""
        prompt, length = job.request.prompt_tokens, job.request.prompt_tokens + job.yielded
        together = prompt if job.yielded == 0 else prompt // self.size * self.size
        if len(job.samples) == 1:
            together = length
        found = [self.find(job, sample) for sample in job.samples]
        common = -(-together // self.size)
        hits = found[0][:common]
        need = common - len(hits)
        for each in found:
            need += -(-length // self.size) - max(common, len(each))
        wanted = {block for each in found for block in each}
        need += sum(self.count[block] == 0 for block in wanted)
        if need + (0 if alone else self.watermark) > len(self.free):
            return None
        for block in hits:
            self.touch(block, len(job.samples))
        for each in found:
            for block in each[common:]:
                self.touch(block, 1)
        computed = together - len(hits) * self.size
        fresh = [self.take() for _ in range(common - len(hits))]
        for block in fresh:
            self.count[block] = len(job.samples)
        for sample, each in zip(job.samples, found, strict=True):
            sample.blocks = hits + fresh + each[common:]
            sample.written = len(sample.blocks) * self.size if each[common:] else together
        first = job.samples[0]
        for place in range(len(hits), common):
            start, end = place * self.size, min((place + 1) * self.size, together)
            self.content[first.blocks[place]] = [job.token(first.number, at) for at in range(start, end)]
            self.remember(job, first, first.blocks[place])
        for sample in job.samples:
            while len(sample.blocks) < -(-length // self.size):
                sample.blocks.append(self.take())
            while sample.written < length:
                self.append(job, sample)
                computed += 1
        return computed

    def touch(self, block: int, times: int) -> None:
        if self.count[block] == 0:
            self.free.remove(block)
        self.count[block] += times

    def room(self, sample: Sample) -> bool:
        """Make place for one more token. False if a block is wanted and there is none."""
        if sample.written % self.size == 0:
            if not self.free:
                return False
            sample.blocks.append(self.take())
            return True
        block = sample.blocks[-1]
        if self.count[block] > 1:  # copy on write
            if not self.free:
                return False
            copy = self.take()
            self.content[copy] = list(self.content[block])
            self.drop(block)
            sample.blocks[-1] = copy
        return True

    def leave(self, sample: Sample) -> None:
        for block in reversed(sample.blocks):
            self.drop(block)
        sample.blocks = []

    def sizes(self, jobs: Sequence[Job]) -> tuple[int, int, int, int]:
        """held, filled, spare, external; and every invariant of the tables."""
        tables = Counter(block for job in jobs for sample in job.samples for block in sample.blocks)
        assert dict(tables) == {block: count for block, count in enumerate(self.count) if count}
        assert sorted([*self.free, *tables]) == list(range(len(self.count)))
        held = len(tables) * self.size
        filled = sum(len(self.content[block]) for block in tables)
        spare = 0
        for job in jobs:
            for sample in job.samples:
                final = job.request.prompt_tokens + sample.answer - 1
                assert len(sample.blocks) * self.size - sample.written < self.size  # the paper's bound on waste
                if len(sample.blocks) == -(-final // self.size) and self.count[sample.blocks[-1]] == 1:
                    spare += len(sample.blocks) * self.size - final
        return held, filled, spare, 0

    def possible(self, request: Request) -> bool:
        full = request.prompt_tokens // self.size
        total = full + sum(-(-(request.prompt_tokens + a - 1) // self.size) - full for a in request.answer_tokens)
        return total <= len(self.count)


class ReferencePieces:
    """Contiguous memory: an array that says who owns each slot, and buddy rules on top of it."""

    def __init__(self, slots: int, longest: int, reserve: str) -> None:
        self.owner: list[object | None] = [None] * slots
        self.longest, self.reserve = longest, reserve
        self.cut: set[tuple[int, int]] = set()  # pieces, free or not, as (address, size)
        self.whole: set[tuple[int, int]] = set()
        address = 0
        for order in range(slots.bit_length() - 1, -1, -1):
            if slots & 1 << order:
                self.whole.add((address, 1 << order))
                address += 1 << order
        self.cut |= self.whole
        self.scattered = 0

    def slots(self, prompt: int, answer: int) -> int:
        power = 1
        while power < answer:
            power *= 2
        return {"max": self.longest, "pow2": min(prompt + power, self.longest), "oracle": prompt + answer - 1}[
            self.reserve
        ]

    def piece(self, slots: int) -> int:
        power = 1
        while power < slots:
            power *= 2
        return power

    def is_free(self, piece: tuple[int, int]) -> bool:
        return all(owner is None for owner in self.owner[piece[0] : piece[0] + piece[1]])

    def join(self, job: Job, alone: bool) -> int | None:
        prompt = job.request.prompt_tokens
        sizes = [self.piece(self.slots(prompt, sample.answer)) for sample in job.samples]
        order = sorted(range(len(sizes)), key=lambda index: -job.samples[index].answer)
        before = set(self.cut)
        taken: list[Sample] = []
        for index in order:
            free = [piece for piece in self.cut if piece[1] >= sizes[index] and self.is_free(piece)]
            if not free:
                for sample in taken:
                    self.mark(sample.piece, None)
                self.cut = before
                empty = sum(owner is None for owner in self.owner)
                self.scattered = empty if sum(sizes) <= empty else 0
                return None
            address, size = min(free, key=lambda piece: (piece[1], piece[0]))
            self.cut.remove((address, size))
            while size > sizes[index]:
                size //= 2
                self.cut.add((address + size, size))
            self.cut.add((address, size))
            sample = job.samples[index]
            sample.piece = (address, size)
            self.mark(sample.piece, sample)
            taken.append(sample)
        for sample in job.samples:
            sample.written = prompt
        self.scattered = 0
        return prompt * len(job.samples)

    def mark(self, piece: tuple[int, int], owner: object | None) -> None:
        address, size = piece
        self.owner[address : address + size] = [owner] * size

    def room(self, sample: Sample) -> bool:
        return True

    def append(self, job: Job, sample: Sample) -> None:
        sample.written += 1
        assert sample.written <= self.slots(job.request.prompt_tokens, sample.answer)

    def leave(self, sample: Sample) -> None:
        self.mark(sample.piece, None)
        self.scattered = 0
        piece = sample.piece
        while piece not in self.whole:
            buddy = (piece[0] ^ piece[1], piece[1])
            if buddy not in self.cut or not self.is_free(buddy):
                break
            self.cut -= {piece, buddy}
            piece = (min(piece[0], buddy[0]), piece[1] * 2)
            self.cut.add(piece)

    def sizes(self, jobs: Sequence[Job]) -> tuple[int, int, int, int]:
        held = filled = spare = external = 0
        for job in jobs:
            for sample in job.samples:
                slots = self.slots(job.request.prompt_tokens, sample.answer)
                assert all(owner is sample for owner in self.owner[sample.piece[0] : sum(sample.piece)])
                held += slots
                filled += sample.written
                spare += slots - (job.request.prompt_tokens + sample.answer - 1)
                external += sample.piece[1] - slots
        return held, filled, spare, external + self.scattered

    def possible(self, request: Request) -> bool:
        empty = ReferencePieces(len(self.owner), self.longest, self.reserve)
        job = Job(0, request, [Sample(n, a) for n, a in enumerate(request.answer_tokens)])
        return empty.join(job, True) is not None


def run(
    pages: ReferencePages | ReferencePieces,
    requests: Sequence[Request],
    *,
    max_model_len: int,
    max_num_seqs: int,
    budget: int,
    timing: tuple[int, int, int],
) -> dict[str, Any]:
    """Simulate step by step. Return every figure that the fast simulator counts, exactly."""
    step_ns, decode_ns, prefill_ns = timing
    figures: dict[str, Any] = Counter()
    delays: list[int] = []
    waiting: list[Job] = []
    running: list[Job] = []
    for number, request in enumerate(requests):
        too_long = request.prompt_tokens + max(request.answer_tokens) > max_model_len
        if too_long or not pages.possible(request) or len(request.answer_tokens) > max_num_seqs:
            figures["refused"] += 1
            continue
        samples = [Sample(index, answer) for index, answer in enumerate(request.answer_tokens)]
        waiting.append(Job(number, request, samples))
    if not waiting:
        return dict(figures)
    now = start = waiting[0].request.arrival_ns
    while waiting or running:
        # Everyone who runs writes one token, in order of arrival.
        victims = 0
        decoded = 0
        for job in list(running):
            for sample in job.samples:
                while job in running and not pages.room(sample):
                    victim = running.pop()  # before anything of this step has been written
                    victims += 1
                    for one in victim.samples:
                        pages.leave(one)
                    waiting.insert(0, victim)
                if job not in running:
                    break
        for job in running:
            for sample in job.samples:
                pages.append(job, sample)
                decoded += 1
        figures["preemptions"] += victims
        # Then who waits may join.
        prefill = 0
        while waiting and waiting[0].request.arrival_ns <= now and not victims:
            job = waiting[0]
            if sum(len(one.samples) for one in running) + len(job.samples) > max_num_seqs:
                break
            expected = count_only(pages, job, not running)
            if prefill and expected and prefill + expected + decoded > budget:
                break
            computed = pages.join(job, not running)
            if computed is None:
                break
            prefill += computed
            waiting.pop(0)
            if job.yielded:
                figures["recomputed"] += computed
            else:
                delays.append(now - job.request.arrival_ns)
                figures["computed"] += computed
                figures["prompts"] += job.request.prompt_tokens
            running.append(job)
        if not running:
            now = waiting[0].request.arrival_ns
            continue
        duration = step_ns + decode_ns * decoded + prefill_ns * prefill
        now += duration
        held, filled, spare, external = pages.sizes(running)
        count = sum(len(job.samples) for job in running)
        figures["peak"] = max(figures["peak"], count)
        figures["steps"] += 1
        sizes = {"held": held, "filled": filled, "spare": spare, "external": external, "running": count}
        figures.update({name: size * duration for name, size in sizes.items()})
        for job in list(running):
            job.yielded += 1
            for sample in [one for one in job.samples if one.answer == job.yielded]:
                assert sample.written == job.request.prompt_tokens + sample.answer - 1
                pages.leave(sample)
                job.samples.remove(sample)
                figures["generated"] += sample.answer
            if not job.samples:
                running.remove(job)
                figures["finished"] += 1
    if isinstance(pages, ReferencePages):
        assert len(pages.free) == len(pages.count)
    else:
        assert pages.cut == pages.whole
    figures["duration"] = now - start
    figures["delays"] = delays
    return dict(figures)


def count_only(pages: ReferencePages | ReferencePieces, job: Job, alone: bool) -> int:
    """The tokens that joining would compute; 0 if there is no room (then joining will say so itself)."""
    if isinstance(pages, ReferencePieces):
        return copy.deepcopy(pages).join(copy.deepcopy(job), alone) or 0
    length, prompt = job.request.prompt_tokens + job.yielded, job.request.prompt_tokens
    found = [pages.find(job, sample) for sample in job.samples]
    if len(job.samples) == 1:
        return length - len(found[0]) * pages.size
    if job.yielded == 0:
        return prompt - len(found[0]) * pages.size
    full = prompt // pages.size
    common = min(len(found[0]), full)
    return (full - common) * pages.size + sum(length - max(full, len(each)) * pages.size for each in found)


def percentile(values: Sequence[int], percent: int) -> int:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(1, -(Fraction(-percent * len(ordered), 100) // 1)) - 1]
