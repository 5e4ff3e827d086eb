"""Contiguous KV memory, preallocated when a request joins: what PagedAttention is measured against.

As the Orca baselines of Kwon et al. 2023 (arXiv:2309.06180, section 6.1): a sequence has one piece of memory for its
whole life, from a buddy allocator (pieces are powers of two), and its length is

    max     max_model_len
    pow2    the prompt and the next power of two of the true answer, at most max_model_len
    oracle  exactly what will be written, as if the answer's length were known

Nothing can be shared, so parallel samples have a prompt each; nothing is ever preempted.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.simulation.batching import Group, Sequence
from orchestrator.simulation.paging import MODEL_TOO_SMALL, POOL_TOO_SMALL

RESERVES = ("max", "pow2", "oracle")


class Buddies:
    """A buddy allocator over any number of slots: split into the powers of two that it is the sum of."""

    def __init__(self, slots: int) -> None:
        self.free = slots
        self._holes: list[set[int]] = [set() for _ in range(slots.bit_length())]  # by order: addresses
        self._orders = slots  # bit k is set while there is a hole of 2**k slots
        self._whole: set[tuple[int, int]] = set()  # (address, order) of the pieces that have no buddy
        address = 0
        for order in reversed(range(slots.bit_length())):
            if slots >> order & 1:
                self._holes[order].add(address)
                self._whole.add((address, order))
                address += 1 << order

    def fits(self, orders: list[int]) -> bool:
        """Whether pieces of these orders, largest first, can be taken one after the other."""
        if len(orders) == 1:
            return self._orders >> orders[0] > 0
        taken = 0
        for order in orders:
            # Powers of two cut from larger ones leave no remainder smaller than themselves.
            taken += 1 << order
            if sum(len(self._holes[size]) << size for size in range(order, len(self._holes))) < taken:
                return False
        return True

    def take(self, order: int) -> int:
        """Return the address of a piece of 2**order slots, cut from the lowest of the smallest that suffice."""
        larger = self._orders >> order
        size = order + (larger & -larger).bit_length() - 1
        holes = self._holes[size]
        address = min(holes)
        holes.remove(address)
        if not holes:
            self._orders ^= 1 << size
        while size > order:
            size -= 1
            self._holes[size].add(address + (1 << size))  # there was none of this size
            self._orders |= 1 << size
        self.free -= 1 << order
        return address

    def give(self, address: int, order: int) -> None:
        """Return a piece; it is joined with its buddy as long as that is free."""
        self.free += 1 << order
        while (address, order) not in self._whole:
            holes = self._holes[order]
            buddy = address ^ (1 << order)
            if buddy not in holes:
                break
            holes.remove(buddy)
            if not holes:
                self._orders ^= 1 << order
            address = min(address, buddy)
            order += 1
        self._holes[order].add(address)
        self._orders |= 1 << order


class ContiguousMemory:
    """The memory of `batching.Memory`, one piece for each sequence. `reserve`: one of RESERVES."""

    def __init__(self, slots: int, max_model_len: int, reserve: str) -> None:
        self.buddies = Buddies(slots)
        self.held = 0
        self.filled = 0
        self.spare = 0
        self.external = 0
        self._empty = Buddies(slots)
        self._max_model_len = max_model_len
        self._reserve = reserve
        self._scattered = 0  # part of `external`: free, and useless to who waits

    def refuses(self, group: Group) -> str | None:
        """Why this request could not even run alone. Also notes what its sequences would reserve."""
        prompt, longest = group.request.prompt_tokens, self._max_model_len
        for sequence in group.sequences:
            if prompt + sequence.answer > longest:
                return MODEL_TOO_SMALL
            if self._reserve == "max":
                sequence.slots = longest
            elif self._reserve == "pow2":
                sequence.slots = min(prompt + (1 << (sequence.answer - 1).bit_length()), longest)
            else:
                sequence.slots = sequence.final_tokens
            sequence.order = (sequence.slots - 1).bit_length()
        return None if self._empty.fits(self._orders(group)) else POOL_TOO_SMALL

    def fit(self, group: Group, alone: bool) -> int | None:
        """Tokens to compute if the group joined now, or None if there are no pieces for it."""
        if self._scattered:
            self.external -= self._scattered
            self._scattered = 0
        orders = self._orders(group)
        if self.buddies.fits(orders):
            return group.request.prompt_tokens * len(orders)
        if sum(1 << order for order in orders) <= self.buddies.free:
            self._scattered = self.buddies.free
            self.external += self._scattered
        return None

    def admit(self, group: Group, step: int) -> None:
        """Take the room that `fit` has just seen."""
        prompt, sequences = group.request.prompt_tokens, group.sequences
        for sequence in sequences if len(sequences) == 1 else sorted(sequences, key=lambda one: -one.answer):
            slots, order = sequence.slots, sequence.order
            sequence.address = self.buddies.take(order)
            self.held += slots
            self.filled += prompt
            self.spare += slots - sequence.final_tokens
            self.external += (1 << order) - slots

    def write(self, step: int, running: Mapping[int, Group]) -> list[Group]:
        """Everyone has room already."""
        return []

    def release(self, sequence: Sequence) -> None:
        """Free what a finished sequence had."""
        slots, order = sequence.slots, sequence.order
        self.buddies.give(sequence.address, order)
        self.held -= slots
        self.filled -= sequence.final_tokens
        self.spare -= slots - sequence.final_tokens
        self.external -= (1 << order) - slots + self._scattered
        self._scattered = 0  # who waits will try again

    def next_event(self, step: int) -> int | None:
        """Nothing ever happens."""
        return None

    def _orders(self, group: Group) -> list[int]:
        if len(group.sequences) == 1:
            return [group.sequences[0].order]
        return sorted((sequence.order for sequence in group.sequences), reverse=True)
