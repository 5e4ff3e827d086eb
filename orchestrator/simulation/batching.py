"""Continuous batching: the loop of an engine, whatever its memory is like.

What is assumed. Each step, every running sequence writes the KV of one token and yields the next, so that a prompt of P
tokens and an answer of A leave P + A - 1 in memory: the last token is never written. A request joins between two
steps, first come, first served; the step in which it joins computes its whole prompt (prefills are not split: one
that is longer than `max_num_batched_tokens` has a step to itself, which takes time in proportion) and yields its first
token. What has finished in a step is freed at its end.

Time is in whole nanoseconds, so sums do not depend on their order: a run of steps in which nothing begins, ends or
needs memory is taken in one jump, with the figures that single steps would give.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Protocol

from orchestrator.simulation.measures import Tally
from orchestrator.simulation.trace import Request


class Sequence:
    """One sample of a request: its length to come, and where its tokens are.

    final_tokens: what it has in memory at the end. finish: the step that yields its last token; -1 while preempted.

    Paged memory: `shared` and `own` are the block table, in this order; blocks in `shared` are counted by reference,
    `own` only this one has. partial: the last block of `shared` is not full and will be copied on write.
    phase: steps that equal it modulo the block size find the last block full. final_step: when it gets its last block.

    Contiguous memory: address of a piece of 2**order slots, of which `slots` are reserved.
    """

    __slots__ = (
        "address", "answer", "final_step", "final_tokens", "finish", "group", "order", "own", "partial", "phase",
        "sample", "shared", "slots",
    )  # fmt: skip
    shared: list[int]
    own: list[int]
    partial: bool
    phase: int
    final_step: int
    address: int
    order: int
    slots: int

    def __init__(self, group: Group, sample: int, answer: int, prompt: int) -> None:
        self.group = group
        self.sample = sample
        self.answer = answer
        self.final_tokens = prompt + answer - 1
        self.finish = -1


class Group:
    """A request: its samples run, and are preempted, together (arXiv:2309.06180, section 4.5).

    serial: its number among the accepted. generated: tokens that each sample had yielded when it was last (re)admitted.
    sequences: the samples that have not finished. keys: of the blocks of its prompt that others may share, in order.
    found: the cached blocks that `Memory.fit` saw: of the prompt, and of each sample.
    """

    __slots__ = ("admitted", "found", "generated", "keys", "request", "sequences", "serial")

    def __init__(self, serial: int, request: Request) -> None:
        self.serial = serial
        self.request = request
        self.generated = 0
        self.admitted = -1
        prompt = request.prompt_tokens
        self.sequences = [Sequence(self, sample, answer, prompt) for sample, answer in enumerate(request.answer_tokens)]
        self.keys: tuple[int, ...] | None = None
        self.found: tuple[list[int], list[list[int]]] = ([], [])


class Memory(Protocol):
    """Where the tokens of running sequences are kept. All sizes in slots; one slot holds the KV of one token.

    held: given to sequences. filled: of those, the ones that hold a token. spare: of those, the ones that never will.
    external: slots outside of `held` that nobody can use: rounding, and free memory too scattered for who waits.
    """

    filled: int  # `Engine` adds the tokens that are decoded

    @property
    def held(self) -> int: ...
    @property
    def spare(self) -> int: ...
    @property
    def external(self) -> int: ...

    def refuses(self, group: Group) -> str | None:
        """Why this request could not even run alone."""

    def fit(self, group: Group, alone: bool) -> int | None:
        """Tokens to compute if the group joined now, or None if there is no room. `alone`: nothing else runs."""

    def admit(self, group: Group, step: int) -> None:
        """Take the room that `fit` has just seen; `filled` grows by the tokens that were not there before."""

    def write(self, step: int, running: dict[int, Group]) -> list[Group]:
        """Make room for one more token of each sequence. Return whom that displaced, taken out of `running`."""

    def release(self, sequence: Sequence) -> None:
        """Free what a finished sequence had."""

    def next_event(self, step: int) -> int | None:
        """The first step after this one in which `write` has anything to do, if nobody joins."""


class Engine:
    """Runs requests through one memory. `run` may be called once."""

    def __init__(
        self, memory: Memory, *, max_num_seqs: int, max_num_batched_tokens: int, timing_ns: tuple[int, int, int]
    ) -> None:
        self._memory = memory
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._step_ns, self._decode_ns, self._prefill_ns = timing_ns
        self._finishes: dict[int, list[Sequence]] = {}
        self._finish_steps: list[int] = []  # a heap of the keys above
        self.running: dict[int, Group] = {}
        self.tally = Tally()

    def run(self, requests: Iterable[Request]) -> Tally:
        """Simulate to the end, when every accepted request has all its tokens."""
        for _ in self.steps(requests):
            pass
        self.tally.close()
        return self.tally

    def steps(self, requests: Iterable[Request]) -> Iterator[int]:
        """Simulate; yields the number of each step that was taken singly, when it is done."""
        memory, tally, running, finishes = self._memory, self.tally, self.running, self._finishes
        accepted = self._accept(requests)
        head = next(accepted, None)
        if head is None:
            return
        preempted: list[Group] = []  # the next to run again is at the end
        now = head.request.arrival_ns
        tally.open(now)
        step = 0
        blocked = False  # who waits has been refused room, and nothing has been freed since
        count = 0  # running sequences
        while True:
            # Everyone who runs gets room for a token.
            victims = memory.write(step, running) if running else []
            for group in victims:
                tally.preemptions += 1
                count -= len(group.sequences)
                group.generated += step - group.admitted
                for sequence in group.sequences:
                    sequence.finish = -1
                preempted.append(group)
                blocked = False
            decoding = count
            memory.filled += decoding

            # Who waits may join. The queue is the rest of `requests`: only its head is ever held.
            prefill = 0
            while not blocked and not victims:
                group_or_none = preempted[-1] if preempted else head
                if group_or_none is None or group_or_none.request.arrival_ns > now:
                    break
                group = group_or_none
                if count + len(group.sequences) > self._max_num_seqs:
                    blocked = True
                    break
                computed = memory.fit(group, not running)
                if computed is None:
                    blocked = True
                    break
                if prefill and prefill + computed + decoding > self._budget:
                    break
                if preempted:
                    preempted.pop()
                    tally.recomputed_tokens += computed
                else:
                    head = next(accepted, None)
                    tally.admitted(now - group.request.arrival_ns, group.request.prompt_tokens, computed)
                self._start(group, step)
                memory.admit(group, step)
                prefill += computed
                count += len(group.sequences)

            # The step itself takes time; with nobody in it, it is the next arrival's turn.
            if not running:
                if head is None:
                    return
                now = head.request.arrival_ns
                continue
            if count > tally.peak_running:
                tally.peak_running = count
            duration = self._step_ns + self._decode_ns * decoding + self._prefill_ns * prefill
            now += duration
            tally.add(now, duration, memory.held, memory.filled, memory.spare, memory.external, count)
            tally.steps += 1

            # Who has its last token leaves.
            if step in finishes:
                heapq.heappop(self._finish_steps)
                for sequence in finishes.pop(step):
                    if sequence.finish == step:  # else it was preempted since
                        memory.release(sequence)
                        group = sequence.group
                        tally.generated_tokens += sequence.answer
                        count -= 1
                        blocked = False
                        group.sequences.remove(sequence)
                        if not group.sequences:
                            del running[group.serial]
                            tally.finished += 1
            yield step

            # The steps before anything else can happen are one jump.
            if running and (blocked or not preempted):
                event = memory.next_event(step)
                until = self._finish_steps[0]
                quiet = (until if event is None or until < event else event) - step - 1
                if quiet > 0:
                    duration = self._step_ns + self._decode_ns * count
                    if not blocked and head is not None:
                        quiet = min(quiet, -((now - head.request.arrival_ns) // duration))
                    if quiet > 0:
                        now += quiet * duration
                        # Tokens grow by `count` a step: filled + count, filled + 2 count, ...
                        mean = memory.filled * quiet + count * (quiet * (quiet + 1) // 2)
                        tally.jump(now, quiet, duration, memory.held, mean, memory.spare, memory.external, count)
                        memory.filled += count * quiet
                        tally.steps += quiet
                        step += quiet
            step += 1

    def _accept(self, requests: Iterable[Request]) -> Iterator[Group]:
        serial = 0
        for request in requests:
            self.tally.requests += 1
            group = Group(serial, request)
            reason = self._memory.refuses(group)
            if reason is None and len(group.sequences) > self._max_num_seqs:
                reason = "more samples than max_num_seqs"
            if reason is None:
                serial += 1
                yield group
            else:
                self.tally.refused[reason] = self.tally.refused.get(reason, 0) + 1

    def _start(self, group: Group, step: int) -> None:
        self.running[group.serial] = group
        group.admitted = step
        for sequence in group.sequences:
            last = sequence.finish = step + sequence.answer - group.generated - 1
            at_step = self._finishes.get(last)
            if at_step is None:
                self._finishes[last] = [sequence]
                heapq.heappush(self._finish_steps, last)
            else:
                at_step.append(sequence)
