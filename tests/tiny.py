"""Tiny real models for tests: random but not degenerate weights, a real BPE tokenizer, a few hundred kilobytes.

Activations have a few strong features, as trained models have, so that methods that look at inputs differ from those
that do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 256
_EMBEDDINGS = ("embed", ".wte.", ".wpe.")
_TEXT = [
    "the quick brown fox jumps over the lazy dog while seven wizards quietly judge my vow",
    "import os\nfor name in sorted(os.listdir(path)):\n    print(name, os.stat(name).st_size)\n",
    "a model is compressed layer by layer, block by block, and never as a whole: 0123456789",
]
# Those whose blocks and layers are named as Llama's, and those that are named, stored or built in another way.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
OTHER_ARCHITECTURES = (
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
ALWAYS_TIED = ("gemma2", "gemma3_text", "gpt2", "opt")  # as all published models of these are


def make_model(
    folder: Path,
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    seed: int = 0,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    layers: int = 3,
    kv_heads: int = 2,
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint of `architecture` into `folder`; the same arguments give the same bytes.

    "mistral" has a sliding window of 8 tokens; "qwen2" has one in its last layers only, and biases; the Gemmas have
    one in every other layer. Mixtures have 4 experts, 2 for each token.
    """
    from transformers import AutoModelForCausalLM

    config = _config(architecture, tied, hidden_size, intermediate_size, layers, kv_heads)
    config.architectures = None  # set when saving
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                num_in = parameter.shape[0] if architecture == "gpt2" else parameter.shape[-1]
                # A tied table of the larger spread would make logits of some ten, and blocks hardly matter.
                table = 0.125 if architecture in ALWAYS_TIED else 1.0
                spread = table if any(part in name for part in _EMBEDDINGS) else 1.2 / num_in**0.5
                parameter.data = torch.randn(parameter.shape, generator=generator) * spread
            elif name.endswith("bias"):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            else:  # norms: a few features are strong; Gemma's multiply by one more than is stored
                strength = torch.exp(torch.randn(parameter.shape, generator=generator) * 0.7)
                parameter.data = strength - 1 if architecture.startswith("gemma") else strength
    if tied:
        model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with `VOCABULARY` entries at most into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Bytes that the text does not hold are left out: 256 entries have to do for merges too.
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_tokens(sequences: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids [N, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (sequences, length), generator=generator)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json in place; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _config(architecture: str, tied: bool, hidden_size: int, intermediate_size: int, layers: int, kv_heads: int) -> Any:
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied or architecture in ALWAYS_TIED,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if architecture not in _OWN_ENTRIES:
        raise ValueError(f"no tiny {architecture}")
    entries = {**common, **_OWN_ENTRIES[architecture](hidden_size, intermediate_size)}
    return AutoConfig.for_model(architecture, **{key: value for key, value in entries.items() if value != "drop"})


def _mixture(hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    return {
        "head_dim": hidden_size // 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": intermediate_size // 2,
        "shared_expert_intermediate_size": intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],  # the first block is a dense one
    }


# What differs from the entries that all have, from the model's width and that of its feed-forward layers.
_OWN_ENTRIES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "llama": lambda width, inner: {},
    "mistral": lambda width, inner: {"sliding_window": 8, "head_dim": width // 4},
    "qwen2": lambda width, inner: {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": lambda width, inner: {"head_dim": width // 2},
    "gemma2": lambda width, inner: {"sliding_window": 8, "head_dim": width // 2, "query_pre_attn_scalar": 24},
    "gemma3_text": lambda width, inner: {
        "sliding_window": 8,
        "head_dim": width // 2,
        "layer_types": (["sliding_attention", "full_attention"] * 16)[:3],
    },
    "phi3": lambda width, inner: {"partial_rotary_factor": 0.5, "sliding_window": 8},
    "gpt2": lambda width, inner: {"n_inner": inner, "intermediate_size": "drop"},
    "opt": lambda width, inner: {"ffn_dim": inner, "word_embed_proj_dim": width // 2},
    "gpt_neox": lambda width, inner: {"rotary_pct": 0.25, "use_parallel_residual": True},
    "mixtral": lambda width, inner: {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen2_moe": _mixture,
    "qwen3_moe": _mixture,
}
