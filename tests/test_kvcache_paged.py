"""The block pool: the same logits as a contiguous cache, and equal beginnings held once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from orchestrator.api import Checkpoint
from orchestrator_kvcache.block_pool import BlockPool
from orchestrator_kvcache.paged import Paged, PagedSequence
from tests.tiny import make_model, make_tokens

# The name of Transformers before 5.24, which all supported versions take.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

LAYERS = 3
SIZE = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("model")
    return Checkpoint(make_model(folder / "llama", "llama", dtype=torch.float32, tokenizer=False))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> PreTrainedModel:
    return checkpoint.load()


@torch.no_grad()
def step(model: PreTrainedModel, cache: object, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0]


def contiguous(model: PreTrainedModel, *steps: list[int]) -> torch.Tensor:
    cache = DynamicCache()
    return torch.cat([step(model, cache, tokens) for tokens in steps])


@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
@pytest.mark.parametrize("sizes", [[1] * 40, [40], [5, 1, 1, 20, 13]])
def test_logits_are_those_of_a_contiguous_cache_bit_for_bit(
    model: PreTrainedModel, checkpoint: Checkpoint, block_size: int, sizes: list[int]
) -> None:
    pieces = [piece[0].tolist() for piece in make_tokens(1, 40, seed=1).split(sizes, 1)]
    with Paged(block_size=block_size).attached(model, checkpoint) as cache:
        logits = torch.cat([step(model, cache, piece) for piece in pieces])
    assert torch.equal(logits, contiguous(model, *pieces))


def test_sequences_with_one_beginning_hold_its_blocks_once(model: PreTrainedModel) -> None:
    pool = BlockPool(LAYERS, SIZE)
    beginning = make_tokens(1, 3 * SIZE + 2, seed=2)[0].tolist()
    prompts = [beginning + make_tokens(1, 9, seed=seed)[0].tolist() for seed in (10, 11, 12, 13)]
    sequences = []
    for prompt in prompts:
        sequence = PagedSequence.starting_with(pool, prompt)
        read = sequence.tokens
        logits = step(model, sequence.cache(), prompt[read:])
        # Shared keys and values were computed in another step, of another length: equal numbers, other sums.
        torch.testing.assert_close(logits, contiguous(model, prompt)[read:], rtol=1e-4, atol=1e-4)
        sequences.append((sequence, read))
    assert [read for _, read in sequences] == [0, 3 * SIZE, 3 * SIZE, 3 * SIZE]
    shared = sequences[0][0].table[:3]
    assert all(torch.equal(sequence.table[:3], shared) for sequence, _ in sequences)
    own = -(-len(prompts[0]) // SIZE) - 3
    assert pool.num_held == 3 + 4 * own == pool.num_blocks
    assert pool.holders_P[shared.long()].tolist() == [4, 4, 4]
    one_block = 2 * LAYERS * SIZE * 2 * 16 * 4  # K and V, layers, tokens, KV heads, width, float32
    held = Paged(block_size=SIZE).held_bytes(sequences[0][0].cache())
    assert held == pool.num_blocks * (one_block + 4) + 4 * (3 + own)


def test_a_whole_prompt_that_is_there_leaves_its_last_block_to_be_read(model: PreTrainedModel) -> None:
    pool = BlockPool(LAYERS, SIZE)
    prompt = make_tokens(1, 2 * SIZE, seed=3)[0].tolist()
    step(model, PagedSequence.starting_with(pool, prompt).cache(), prompt)
    assert PagedSequence.starting_with(pool, prompt).tokens == SIZE
    assert PagedSequence.starting_with(pool, [*prompt, 5]).tokens == 2 * SIZE


def test_equal_blocks_after_different_beginnings_are_not_shared(model: PreTrainedModel) -> None:
    pool = BlockPool(LAYERS, SIZE)
    tail = make_tokens(1, 2 * SIZE, seed=4)[0].tolist()
    first, second = [2] * SIZE + tail, [3] * SIZE + tail
    step(model, PagedSequence.starting_with(pool, first).cache(), first)
    assert PagedSequence.starting_with(pool, second).tokens == 0


def test_a_fork_shares_all_blocks_until_one_of_both_writes(model: PreTrainedModel) -> None:
    pool = BlockPool(LAYERS, SIZE)
    prompt = make_tokens(1, 2 * SIZE + 3, seed=5)[0].tolist()
    first = PagedSequence(pool)
    step(model, first.cache(), prompt)
    second = first.fork()
    assert (pool.num_held, pool.num_blocks) == (3, 3)
    one, other = step(model, first.cache(), [7]), step(model, second.cache(), [9])
    assert pool.num_held == 4  # the last block, written by both, was copied once
    assert first.table[:2].tolist() == second.table[:2].tolist() and first.table[2] != second.table[2]
    assert torch.equal(one, contiguous(model, prompt, [7])[-1:])
    assert torch.equal(other, contiguous(model, prompt, [9])[-1:])
    # Neither has written into the other's past.
    assert torch.equal(step(model, first.cache(), [11]), contiguous(model, prompt, [7], [11])[-1:])


def test_blocks_given_back_are_found_again_until_they_are_needed(model: PreTrainedModel) -> None:
    pool = BlockPool(LAYERS, SIZE)
    prompt = make_tokens(1, 2 * SIZE + 1, seed=6)[0].tolist()
    first = PagedSequence.starting_with(pool, prompt)
    with torch.inference_mode():
        step(model, first.cache(), prompt)
    first.close()
    assert (pool.num_held, pool.num_blocks) == (0, 3)
    again = PagedSequence.starting_with(pool, prompt)
    assert again.tokens == 2 * SIZE
    again.close()
    other = make_tokens(1, 3 * SIZE, seed=7)[0].tolist()
    logits = step(model, PagedSequence.starting_with(pool, other).cache(), other)
    assert torch.equal(logits, contiguous(model, other))
    assert pool.num_blocks == 3  # used again, not grown
    assert PagedSequence.starting_with(pool, prompt).tokens == 0  # so what they held is gone


def test_tokens_after_unnamed_ones_cannot_be_named(model: PreTrainedModel) -> None:
    sequence = PagedSequence(BlockPool(LAYERS, SIZE))
    step(model, sequence.cache(), [4, 5, 6])
    with pytest.raises(ValueError, match="3 tokens before these"):
        sequence.announce([7])
