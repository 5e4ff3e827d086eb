"""What all cache policies have in common, on tiny models of several architectures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from orchestrator.api import CachePolicy, Checkpoint, ModelShape, SpecError, StepError
from orchestrator.plugins import discover
from orchestrator.testing import check_method
from orchestrator_kvcache.fp8 import FP8
from orchestrator_kvcache.h2o import H2O
from orchestrator_kvcache.int8 import Int8
from orchestrator_kvcache.kivi import KIVI
from orchestrator_kvcache.paged import Paged
from orchestrator_kvcache.streaming_llm import StreamingLLM
from orchestrator_kvcache.window import Window
from tests.tiny import edit_config, make_model, make_tokens

# The name of Transformers before 5.24, which all supported versions take.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

TOKENS = 36
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox")
# Small enough to forget something within 36 tokens.
FORGETTING: tuple[CachePolicy, ...] = (
    StreamingLLM(sinks=3, window=9),
    Window(window=9),
    H2O(heavy=6, recent=5),
)
COMPRESSING: tuple[CachePolicy, ...] = (
    Int8(),
    Int8(symmetric=False),
    KIVI(num_bits=4, group_size=4, residual=8),
    KIVI(num_bits=2, group_size=8, residual=16),
    KIVI(num_bits=2, group_size=8, residual=16, keys="token"),
    FP8(),
)
# Large enough to be Transformers' own cache.
WHOLE: tuple[CachePolicy, ...] = (
    Paged(block_size=8),
    StreamingLLM(sinks=4, window=TOKENS),
    StreamingLLM(sinks=0, window=TOKENS),
    Window(window=TOKENS),
    H2O(heavy=TOKENS - 1, recent=1),
    KIVI(group_size=4, residual=64),
)
EVERY = FORGETTING + COMPRESSING + WHOLE


def label(policy: CachePolicy) -> str:
    return f"{policy.name}-{'-'.join(str(value) for value in policy.model_dump().values())}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    names = (*ARCHITECTURES, "gpt2", "opt")
    return {name: Checkpoint(make_model(folder / name, name, dtype=torch.float32, tokenizer=False)) for name in names}


@torch.no_grad()
def read(
    model: PreTrainedModel, checkpoint: Checkpoint, policy: CachePolicy, tokens: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Logits [T, V] of tokens [1, T] in steps of `sizes`; and after each step, tokens so far and bytes held."""
    logits, held, done = [], [], 0
    with policy.attached(model, checkpoint) as cache:
        for piece in tokens.split(sizes, 1):
            logits.append(model(piece, past_key_values=cache, use_cache=True).logits[0])
            done += piece.shape[1]
            held.append((done, policy.held_bytes(cache)))
    return torch.cat(logits), held


PIECES = [7, 1, 3, 11, 1, 13]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_several_tokens_at_once_see_what_each_would_see_alone(
    checkpoints: dict[str, Checkpoint], architecture: str
) -> None:
    # In float64 a difference of the order of sums cannot push a number over a rounding boundary.
    checkpoint = checkpoints[architecture]
    model, tokens = checkpoint.load(torch.float64), make_tokens(1, TOKENS, seed=1)
    for policy in FORGETTING + COMPRESSING:
        alone, _ = read(model, checkpoint, policy, tokens, [1] * TOKENS)
        together, _ = read(model, checkpoint, policy, tokens, PIECES)
        # Scales and 8-bit values are read in float32.
        assert (together - alone).abs().max() < 1e-4, label(policy)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_that_forgets_nothing_gives_the_models_own_logits(
    checkpoints: dict[str, Checkpoint], architecture: str
) -> None:
    checkpoint = checkpoints[architecture]
    model, tokens = checkpoint.load(torch.float64), make_tokens(1, TOKENS, seed=2)
    with torch.no_grad():
        own = model(tokens).logits[0]
    for policy in WHOLE:
        logits, _ = read(model, checkpoint, policy, tokens, PIECES)
        assert (logits - own).abs().max() < 1e-5, label(policy)  # Gemma 2 takes its softmax in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", EVERY, ids=label)
def test_bytes_planned_are_bytes_held_after_every_step(
    checkpoints: dict[str, Checkpoint], policy: CachePolicy, dtype: torch.dtype
) -> None:
    checkpoint = checkpoints["qwen3"]
    model = checkpoint.load(dtype)
    shape = ModelShape.from_config({**checkpoint.config, "dtype": str(dtype).removeprefix("torch.")})
    tokens = make_tokens(1, TOKENS, seed=3)
    for sizes in ([1] * TOKENS if dtype == torch.float32 else [TOKENS], PIECES):
        for done, held in read(model, checkpoint, policy, tokens, sizes)[1]:
            assert held == policy.planned_bytes(shape, done), f"after {done} tokens"
    assert policy.planned_bytes(shape, 0) == 0


@pytest.mark.parametrize("policy", FORGETTING, ids=label)
def test_a_policy_that_forgets_holds_no_more_however_long_the_stream(
    checkpoints: dict[str, Checkpoint], policy: CachePolicy
) -> None:
    checkpoint = checkpoints["llama"]
    _, held = read(checkpoint.load(), checkpoint, policy, make_tokens(1, 200, seed=4), [25] * 8)
    assert len({size for _, size in held}) == 1


@pytest.mark.parametrize("policy", [StreamingLLM(sinks=3, window=9), KIVI(group_size=4, residual=8)], ids=label)
def test_the_model_is_as_before_when_the_cache_is_closed(
    checkpoints: dict[str, Checkpoint], policy: CachePolicy
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    checkpoint = checkpoints["llama"]
    model, tokens = checkpoint.load(), make_tokens(1, 20)
    known = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    with torch.no_grad():
        before = model(tokens).logits
        with pytest.raises(ZeroDivisionError), policy.attached(model, checkpoint):
            raise ZeroDivisionError
        assert torch.equal(model(tokens).logits, before)
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) == known


def test_one_cache_at_a_time_and_only_where_it_is_attached(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama"]
    model, policy = checkpoint.load(), Window(window=4)
    with policy.attached(model, checkpoint) as cache:
        with pytest.raises(StepError, match="another cache"), policy.attached(model, checkpoint):
            pass
        with pytest.raises(ValueError, match="one stream"):
            model(make_tokens(2, 4), past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="taken out"), torch.no_grad():
        for _ in range(2):
            model(make_tokens(1, 4), past_key_values=cache, use_cache=True)


def test_streams_follow_generate_to_the_same_words(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama"]
    model, tokens = checkpoint.load(), make_tokens(1, 10, seed=5)
    wanted = model.generate(tokens, max_new_tokens=12, do_sample=False, past_key_values=DynamicCache())
    for policy in WHOLE:
        with policy.attached(model, checkpoint) as cache:
            got = model.generate(tokens, max_new_tokens=12, do_sample=False, past_key_values=cache)
        assert torch.equal(got, wanted), label(policy)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_positions_in_the_cache_need_rotary_ones(checkpoints: dict[str, Checkpoint], architecture: str) -> None:
    checkpoint = checkpoints[architecture]
    policy = StreamingLLM(sinks=2, window=8)
    with pytest.raises(SpecError, match=f"{architecture} has no rotary positions.*learned"):
        policy.check_model(checkpoint.config)
    with pytest.raises(StepError, match="learned"), policy.attached(checkpoint.load(), checkpoint):
        pass
    Window(window=8).check_model(checkpoint.config)
    logits, _ = read(checkpoint.load(), checkpoint, Window(window=8), make_tokens(1, 20), [20])
    assert logits.isfinite().all()


def test_positions_that_change_with_length_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "dynamic", "llama", tokenizer=False)
    edit_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    checkpoint = Checkpoint(folder)
    with pytest.raises(SpecError, match="dynamic"):
        StreamingLLM().check_model(checkpoint.config)
    with pytest.raises(StepError, match="dynamic"), StreamingLLM().attached(checkpoint.load(), checkpoint):
        pass


@pytest.mark.parametrize("scaling", ["llama3", "yarn", "linear"])
def test_scaled_rotary_positions_are_the_models_own(tmp_path: Path, scaling: str) -> None:
    folder = make_model(tmp_path / scaling, "llama", tokenizer=False)
    entries = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if scaling == "llama3":
        entries |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_config(folder, rope_parameters=entries)
    checkpoint, tokens = Checkpoint(folder), make_tokens(1, TOKENS)
    model = checkpoint.load(torch.float64)
    logits, _ = read(model, checkpoint, StreamingLLM(sinks=4, window=TOKENS), tokens, PIECES)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits[0], rtol=1e-6, atol=1e-6)


def test_latent_attention_and_linear_layers_are_refused_by_name() -> None:
    for policy in EVERY:
        with pytest.raises(SpecError, match="latent"):
            policy.check_model({"model_type": "deepseek_v3", "kv_lora_rank": 512})
        with pytest.raises(SpecError, match="linear_attention"):
            policy.check_model({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]})


def test_learned_sinks_are_refused_where_attention_is_taken_over() -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "full_attention"],
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    checkpoint = Checkpoint(Path())  # nothing of it is read
    refused = pytest.raises(StepError, match="learned attention sinks")
    with refused, torch.no_grad(), Window(window=4).attached(model, checkpoint) as cache:
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)


def test_groups_that_do_not_divide_a_head_are_refused_with_those_that_do(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["llama"]  # 64 / 4 heads = 16
    with pytest.raises(SpecError, match=r"group_size 32 does not divide the 16 channels.*use one of 4, 8, 16"):
        KIVI().check_model(checkpoint.config)
    with pytest.raises(StepError, match="does not divide"), KIVI().attached(checkpoint.load(), checkpoint):
        pass
    with pytest.raises(ValueError, match="not a multiple of group_size"):
        KIVI(group_size=32, residual=40)


def test_policies_come_by_the_door_of_third_parties_and_import_no_torch() -> None:
    found = {key[1]: method for key, method in discover().installed.items() if method.kind == "CachePolicy"}
    assert set(found) >= {"paged", "streaming_llm", "window", "h2o", "int8", "kivi", "fp8"}
    script = "import sys, orchestrator_kvcache; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# The kit reads 50 tokens at first, which H2O takes for a prompt: its budget must hold them.
KIT = (
    StreamingLLM(sinks=3, window=9),
    Window(window=9),
    H2O(heavy=30, recent=25),
    Int8(),
    KIVI(num_bits=2, group_size=8, residual=16),
    FP8(),
    Paged(),
)


@pytest.mark.parametrize("policy", KIT, ids=label)
def test_policies_keep_what_the_kit_asks_of_third_parties(policy: CachePolicy) -> None:
    check_method(policy)
