"""Cache policies against independent references: written without their code, one token at a time, in float64.

Legend: H = query heads, K = key/value heads, D = width of a head, N = tokens attended to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.api import CachePolicy, Checkpoint
from orchestrator_kvcache.fp8 import FP8, scales_from, to_fp8
from orchestrator_kvcache.h2o import H2O
from orchestrator_kvcache.int8 import Int8Store
from orchestrator_kvcache.kivi import KIVI, Rounded
from orchestrator_kvcache.streaming_llm import StreamingLLM
from orchestrator_kvcache.window import Window
from tests.tiny import edit_config, make_model, make_tokens

# The name of Transformers before 5.24, which all supported versions take.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

TOKENS = 40
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
Past = list[dict[str, torch.Tensor]]  # of one layer: un-rotated keys and values [K, D] of each token
# (layer, key/value head, newest token) -> (token, its position, the newest one's position) of all attended to
Choice = Callable[[int, int, int], list[tuple[int, int, int]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: Checkpoint(make_model(folder / name, name, dtype=torch.float32, tokenizer=False))
        for name in ARCHITECTURES
    }


def rotated(heads_HD: torch.Tensor, position: int, frequency: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) by position * frequency_i: arXiv:2104.09864, equation 34."""
    first, second = heads_HD.chunk(2, -1)
    cos, sin = torch.cos(position * frequency), torch.sin(position * frequency)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Reference:
    """A decoder that reads one token at a time; un-rotated keys and values of all tokens are in `past`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.load(torch.float64)
        self.config = self.model.config
        self.past: list[Past] = [[] for _ in range(self.config.num_hidden_layers)]

    def frequency(self, layer: int) -> torch.Tensor:
        rotary = self.model.model.rotary_emb
        kinds = self.config.layer_types if hasattr(rotary, "layer_types") else None
        return getattr(rotary, f"{kinds[layer]}_inv_freq" if kinds else "inv_freq").double()

    def window(self, layer: int) -> int:
        sliding = getattr(self.model.model.layers[layer].self_attn, "sliding_window", None)
        return sliding or 10**9

    @torch.no_grad()
    def step(self, token: int, choose: Choice, after: Any = None):
        """Logits [V] of one more token. after: told each query head's tokens, and what it paid to each."""
        model = self.model.model
        state = model.embed_tokens(torch.tensor([[token]]))[0, 0]
        for layer, block in enumerate(model.layers):
            attention = block.self_attn
            normed = block.input_layernorm(state)
            width = attention.head_dim
            query_HD, key_KD, value_KD = (
                getattr(attention, f"{part}_proj")(normed).view(-1, width) for part in ("q", "k", "v")
            )
            if hasattr(attention, "q_norm"):
                query_HD, key_KD = attention.q_norm(query_HD), attention.k_norm(key_KD)
            past = self.past[layer]
            past.append({"key": key_KD, "value": value_KD})
            outputs, frequency = [], self.frequency(layer)
            group = len(query_HD) // len(key_KD)
            for head, query_D in enumerate(query_HD):
                own = head // group
                places = choose(layer, own, len(past) - 1)
                places = [place for place in places if place[2] - place[1] < self.window(layer)]
                scores = torch.stack(
                    [
                        rotated(query_D[None], mine, frequency)[0]
                        @ rotated(past[at]["key"][own][None], theirs, frequency)[0]
                        for at, theirs, mine in places
                    ]
                )
                share = (scores * attention.scaling).softmax(0)
                outputs.append(sum(p * past[at]["value"][own] for p, (at, _, _) in zip(share, places, strict=True)))
                if after is not None:
                    after(layer, own, head % group == group - 1, [place[0] for place in places], share.tolist())
            mixed = attention.o_proj(torch.cat(outputs))
            if hasattr(block, "pre_feedforward_layernorm"):
                state = state + block.post_attention_layernorm(mixed)
                state = state + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(state)))
            else:
                state = state + mixed
                state = state + block.mlp(block.post_attention_layernorm(state))
        return self.model.lm_head(model.norm(state))


@torch.no_grad()
def logits_of(checkpoint: Checkpoint, policy: CachePolicy, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    model = checkpoint.load(torch.float64)
    with policy.attached(model, checkpoint) as cache:
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in tokens.split(sizes, 1)]
    return torch.cat(pieces)


PIECES = [3, 1, 18, 1, 17]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streaming_llm_is_attention_over_sinks_and_window_at_places_in_the_cache(
    checkpoints: dict[str, Checkpoint], architecture: str
) -> None:
    sinks, window = 2, 7
    reference, tokens = Reference(checkpoints[architecture]), make_tokens(1, TOKENS, seed=1)

    def choose(layer: int, head: int, now: int) -> list[tuple[int, int, int]]:
        kept = [at for at in range(now + 1) if at < sinks or at > now - window]
        return [(at, place, len(kept) - 1) for place, at in enumerate(kept)]

    wanted = torch.stack([reference.step(token, choose) for token in tokens[0].tolist()])
    for sizes in ([1] * TOKENS, PIECES, [TOKENS]):
        got = logits_of(checkpoints[architecture], StreamingLLM(sinks=sinks, window=window), tokens, sizes)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)  # cosines are float32 in the models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_window_is_attention_over_the_last_tokens_at_places_in_the_stream(
    checkpoints: dict[str, Checkpoint], architecture: str
) -> None:
    window = 7
    reference, tokens = Reference(checkpoints[architecture]), make_tokens(1, TOKENS, seed=2)

    def choose(layer: int, head: int, now: int) -> list[tuple[int, int, int]]:
        return [(at, at, now) for at in range(max(0, now - window + 1), now + 1)]

    wanted = torch.stack([reference.step(token, choose) for token in tokens[0].tolist()])
    got = logits_of(checkpoints[architecture], Window(window=window), tokens, PIECES)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("architecture", "heavy", "recent"), [("llama", 5, 4), ("llama", 0, 6), ("qwen3", 7, 1)])
def test_h2o_keeps_what_has_drawn_most_attention(
    checkpoints: dict[str, Checkpoint], architecture: str, heavy: int, recent: int
) -> None:
    reference, tokens = Reference(checkpoints[architecture]), make_tokens(1, TOKENS, seed=3)
    kept: dict[tuple[int, int], dict[int, float]] = {}  # by layer and head: the tokens kept, and their scores

    def choose(layer: int, head: int, now: int) -> list[tuple[int, int, int]]:
        scores = kept.setdefault((layer, head), {})
        scores.setdefault(now, 0.0)
        return [(at, at, now) for at in scores]

    def after(layer: int, head: int, last: bool, places: list[int], share: list[float]) -> None:
        scores = kept[layer, head]
        for at, paid in zip(places, share, strict=True):
            scores[at] += paid
        if last and len(scores) > heavy + recent:
            candidates = sorted(scores)[:-recent]
            del scores[min(candidates, key=lambda at: scores[at])]

    wanted = torch.stack([reference.step(token, choose, after) for token in tokens[0].tolist()])
    policy = H2O(heavy=heavy, recent=recent)
    got = logits_of(checkpoints[architecture], policy, tokens, PIECES)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    model = checkpoints[architecture].load(torch.float64)
    with policy.attached(model, checkpoints[architecture]) as cache, torch.no_grad():
        for piece in tokens.split(PIECES, 1):
            model(piece, past_key_values=cache, use_cache=True)
        for (layer, head), scores in kept.items():
            assert cache.stores[layer].position_KN[head].tolist() == sorted(scores)
            assert cache.stores[layer].score_KN[head].tolist() == pytest.approx(
                [scores[at] for at in sorted(scores)], 1e-4
            )


def test_h2o_reads_the_prompt_whole_and_then_keeps_its_budget(checkpoints: dict[str, Checkpoint]) -> None:
    model, tokens = checkpoints["llama"].load(torch.float64), make_tokens(1, 30, seed=4)
    with torch.no_grad(), H2O(heavy=4, recent=3).attached(model, checkpoints["llama"]) as cache:
        logits = model(tokens, past_key_values=cache, use_cache=True).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    for store, attention in zip(cache.stores, attentions, strict=True):
        drawn_KN = attention[0].unflatten(0, (2, 2)).sum((1, 2))
        heaviest = drawn_KN[:, :27].topk(4).indices.sort().values
        assert torch.equal(store.position_KN[:, :4].long(), heaviest)
        assert store.position_KN[:, 4:].tolist() == [[27, 28, 29]] * 2


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("tokens", "channels"), [(8, 1), (1, 8)])
def test_kivi_rounds_as_equation_1_says_into_packed_bytes(bits: int, tokens: int, channels: int) -> None:
    values = torch.randn(1, 2, 16, 24, generator=torch.Generator().manual_seed(bits)) * 3
    rounded = Rounded.of(values, bits, tokens, channels)
    assert rounded.packed_BKNP.dtype == torch.uint8 and rounded.packed_BKNP.shape == (1, 2, 16, 24 * bits // 8)
    wanted = np.empty(values.shape)
    codes = np.empty(values.shape, dtype=int)
    plain = values.double().numpy()
    for head in range(2):
        for t in range(0, 16, tokens):
            for c in range(0, 24, channels):
                where = (0, head, slice(t, t + tokens), slice(c, c + channels))
                zero, top = plain[where].min(), plain[where].max()
                scale = (top - zero) / (2**bits - 1)
                codes[where] = np.rint((plain[where] - zero) / scale)
                wanted[where] = codes[where] * scale + zero
                assert np.abs(wanted[where] - plain[where]).max() <= scale / 2 * (1 + 1e-6)
    np.testing.assert_allclose(rounded.read().double().numpy(), wanted, rtol=1e-5, atol=1e-5)
    in_byte = 8 // bits
    by_hand = sum(codes[..., place::in_byte] << (bits * place) for place in range(in_byte))
    assert np.array_equal(rounded.packed_BKNP.numpy(), by_hand)


def test_kivi_rounds_the_old_and_leaves_the_new_as_the_algorithm_says(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint, residual = checkpoints["llama"], 8
    model, tokens = checkpoint.load(), make_tokens(1, TOKENS, seed=6)
    with KIVI(num_bits=4, group_size=4, residual=residual).attached(model, checkpoint) as cache, torch.no_grad():
        for count in range(1, TOKENS + 1):
            model(tokens[:, count - 1 : count], past_key_values=cache, use_cache=True)
            store = cache.stores[0]
            assert store.keys.whole_BKND.shape[2] == count % residual
            assert store.values.whole_BKND.shape[2] == min(count, residual)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_is_off_by_at_most_half_a_step_of_each_token_and_head(symmetric: bool) -> None:
    values = (
        torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0)).double()
        * torch.logspace(-3, 3, 9)[:, None]
    )
    kept = Int8Store(symmetric)
    read, _ = kept.extend(values, values)
    low, high = values.aminmax(dim=-1, keepdim=True)
    spread = values.abs().amax(-1, keepdim=True) / 127 if symmetric else (high - low) / 255
    assert ((read - values).abs() <= spread / 2 * (1 + 1e-4)).all()
    assert {tensor.dtype for tensor in kept.tensors()} == {torch.int8 if symmetric else torch.uint8, torch.float32}


def test_fp8_is_the_nearest_number_of_its_grid_and_saturates() -> None:
    # Every finite e4m3 number, by the format's definition: arXiv:2209.05433, table 1.
    grid = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    grid = sorted({sign * value for value in grid[:-1] for sign in (1, -1)})
    assert grid[-1] == 448
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 300
    got = to_fp8(values, torch.tensor(0.5)).double() * 0.5
    nearest = np.array(grid)[np.abs(np.array(grid)[None] - values.numpy()[:, None] / 0.5).argmin(1)] * 0.5
    np.testing.assert_allclose(np.abs(got.numpy() - values.numpy()), np.abs(nearest - values.numpy()), rtol=1e-6)
    assert got.abs().max() == 224 < values.abs().max()


def test_fp8_takes_its_scales_from_the_checkpoint(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = checkpoints["llama"]
    assert scales_from(source) == {}
    folder = make_model(tmp_path / "scaled", "llama", dtype=torch.float32, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(0.25 * (layer + 1))
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([0.5])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, compression_config={"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    scaled = Checkpoint(folder)
    assert scales_from(scaled) == {0: (0.25, 0.5), 1: (0.5, 0.5), 2: (0.75, 0.5)}
    model, tokens = source.load(), make_tokens(1, 12)
    with FP8().attached(model, scaled) as cache, torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
    assert [store.scale_2.tolist() for store in cache.stores] == [[0.25, 0.5], [0.5, 0.5], [0.75, 0.5]]
    with FP8(scales="one").attached(model, scaled) as cache, torch.no_grad():
        model(tokens, past_key_values=cache, use_cache=True)
    assert [store.scale_2.tolist() for store in cache.stores] == [[1.0, 1.0]] * 3
