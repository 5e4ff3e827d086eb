"""The parts of KV memory on their own: the block pool, block keys and the buddy allocator, against plain models."""

from __future__ import annotations

import random

import pytest

from orchestrator.simulation.block_pool import BlockPool, prompt_keys
from orchestrator.simulation.contiguous import Buddies
from orchestrator.simulation.trace import Request


def test_blocks_are_taken_in_the_order_in_which_they_were_given_back() -> None:
    pool = BlockPool(4)
    assert pool.take(3) == [0, 1, 2] and pool.available == 1
    pool.give([2, 0])
    assert pool.queued() == [3, 2, 0] and pool.take(3) == [3, 2, 0]
    with pytest.raises(RuntimeError, match="1 blocks wanted, 0 available"):
        pool.take(1)


def test_a_cached_block_is_found_until_it_is_taken() -> None:
    pool = BlockPool(3)
    [block] = pool.take(1)
    pool.references[block] = 1
    pool.register([block], ["a"])
    assert pool.drop([block]) == 1 and pool.available == 3
    assert pool.cached == {"a": block}
    pool.share(block, 2)  # out of the middle of the queue
    assert pool.available == 2 and pool.queued() == [1, 2]
    assert pool.drop([block]) == 0 and pool.drop([block]) == 1
    assert pool.queued() == [1, 2, 0]
    assert pool.take(2) == [1, 2] and pool.cached == {"a": block}
    assert pool.take(1) == [block] and pool.cached == {}


def test_of_two_blocks_with_the_same_content_the_other_remains() -> None:
    pool = BlockPool(3)
    first, second = pool.take(2)
    pool.register([first], ["a"])
    pool.register([second], ["a"])
    assert pool.cached == {"a": first}
    pool.give([first])
    assert pool.take(2) == [2, first] and pool.cached == {"a": second}
    pool.give([second])
    assert pool.take(1) == [second] and pool.cached == {}


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_is_a_plain_list_with_removals(seed: int) -> None:
    """Random use, against a list from which found blocks are really removed."""
    draw = random.Random(seed)
    pool = BlockPool(draw.choice([5, 40]))
    plain = list(range(pool.num_blocks))
    content: dict[int, int] = {}
    used: list[int] = []
    for _ in range(20_000):
        action = draw.random()
        if action < 0.3 and plain:
            count = draw.randint(1, min(4, len(plain)))
            blocks = pool.take(count)
            assert blocks == plain[:count]
            del plain[:count]
            for block in blocks:
                content.pop(block, None)
                pool.references[block] = 1
                if draw.random() < 0.7:
                    key = draw.randrange(60)
                    if key not in content.values():
                        content[block] = key
                        pool.register([block], [key])
            used += blocks
        elif action < 0.65 and content:
            block = draw.choice(list(content))
            assert pool.cached[content[block]] == block
            pool.share(block, 1)
            used.append(block)
            if block in plain:
                plain.remove(block)
        elif used:
            block = used.pop(draw.randrange(len(used)))
            pool.drop([block])
            if block not in used:
                plain.append(block)
        assert pool.available == len(plain)
    assert pool.queued() == plain
    assert pool.cached == {key: block for block, key in content.items()}
    assert len(pool._queue) - pool._head <= 2 * len(plain) + 5000


def test_keys_are_equal_as_far_as_the_text_is() -> None:
    def keys(prefix: tuple[int, ...], chunk: int = 8, prompt: int = 100, size: int = 4) -> tuple[int, ...]:
        return prompt_keys(Request(0, prompt, (1,), prefix, chunk), size)

    long = keys((1, 2, 3))
    assert len(long) == len(set(long)) == 6
    assert keys((1, 2)) == long[:4] and keys((1, 2, 4))[:4] == long[:4] and keys((1, 2, 4))[4] != long[4]
    # The chain: the same chunk after another one is other text.
    assert not set(keys((5, 2, 3))) & set(long)
    assert keys((1, 2, 3), prompt=15) == long[:3]
    # A block that spans two chunks is known only if both are.
    assert len(keys((1, 2), size=6)) == 2 and keys((1, 9), size=6)[0] == keys((1, 2), size=6)[0]
    assert keys((1, 9), size=6)[1] != keys((1, 2), size=6)[1]
    assert keys((1,), size=16) == () and len(keys((1, 2), size=16)) == 1
    assert not set(keys((1, 2), chunk=4)) & set(long)


@pytest.mark.parametrize("slots", [1, 64, 100, 1023])
def test_pieces_never_overlap_and_buddies_join_again(slots: int) -> None:
    draw = random.Random(slots)
    buddies = Buddies(slots)
    whole = [set(holes) for holes in buddies._holes]
    pieces: list[tuple[int, int]] = []
    owner = [False] * slots
    refused = 0
    for _ in range(5000):
        if draw.random() < 0.55:
            order = draw.randrange(slots.bit_length() + 1)
            room = any(
                not any(owner[address : address + (1 << order)])
                for address in range(0, slots - (1 << order) + 1, 1 << order)
            )
            assert buddies.fits([order]) == room
            if not room:
                refused += 1
                continue
            address = buddies.take(order)
            assert address % (1 << order) == 0 and not any(owner[address : address + (1 << order)])
            owner[address : address + (1 << order)] = [True] * (1 << order)
            pieces.append((address, order))
        elif pieces:
            address, order = pieces.pop(draw.randrange(len(pieces)))
            owner[address : address + (1 << order)] = [False] * (1 << order)
            buddies.give(address, order)
        assert buddies.free == owner.count(False)
    assert refused > 100
    for piece in pieces:
        buddies.give(*piece)
    assert [set(holes) for holes in buddies._holes] == whole


def test_several_pieces_fit_only_together() -> None:
    buddies = Buddies(12)  # 8 + 4
    assert buddies.fits([3, 2]) and buddies.fits([2, 2, 2]) and not buddies.fits([3, 3]) and not buddies.fits([3, 2, 0])
    assert not buddies.fits([4])
