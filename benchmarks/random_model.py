"""Write a Llama checkpoint with random weights, of any size, a block at a time.

    python -m benchmarks.random_model DIR [--hidden 1024] [--intermediate 2816] [--layers 24] [--vocab 32000] ...

For measuring time and memory where no weights of that size are at hand: bfloat16, one shard for each block. Scaled so
that hidden states neither vanish nor grow with depth. The tokenizer is reference-7m's, all of whose ids are valid in
a vocabulary that is at least as large.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.material import shared_data

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_VOCABULARY = 4096


@dataclass(frozen=True)
class Shape:
    """Of a Llama model."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 24
    vocab: int = 32000
    heads: int = 16
    kv_heads: int = 8
    positions: int = 2048

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


def shards(shape: Shape, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each shard: the embedding, each block, the rest."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, deviation: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * deviation).to(torch.bfloat16)

    def linear(rows: int, columns: int, share: float = 1.0) -> torch.Tensor:
        return normal(rows, columns, share / math.sqrt(columns))

    ones_D = torch.ones(shape.hidden, dtype=torch.bfloat16)
    key_width = shape.kv_heads * (shape.hidden // shape.heads)
    residual = 1 / math.sqrt(2 * shape.layers)  # 2 L terms are added to the residual stream
    yield {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden, 1.0)}
    for number in range(shape.layers):
        block = {
            "self_attn.q_proj": linear(shape.hidden, shape.hidden),
            "self_attn.k_proj": linear(key_width, shape.hidden),
            "self_attn.v_proj": linear(key_width, shape.hidden),
            "self_attn.o_proj": linear(shape.hidden, shape.hidden, residual),
            "mlp.gate_proj": linear(shape.intermediate, shape.hidden),
            "mlp.up_proj": linear(shape.intermediate, shape.hidden),
            "mlp.down_proj": linear(shape.hidden, shape.intermediate, residual),
            "input_layernorm": ones_D.clone(),
            "post_attention_layernorm": ones_D.clone(),
        }
        yield {f"model.layers.{number}.{name}.weight": tensor for name, tensor in block.items()}
    yield {"model.norm.weight": ones_D, "lm_head.weight": linear(shape.vocab, shape.hidden)}


def write(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the checkpoint; no more than a shard is ever in memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    count = shape.layers + 2
    where: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards(shape, seed), start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    if shape.vocab >= TOKENIZER_VOCABULARY:
        for name in TOKENIZER_FILES:
            shutil.copyfile(shared_data() / "models" / "reference-7m" / name, folder / name)


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, value in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    arguments = parser.parse_args()
    write(arguments.folder, Shape(**{name: getattr(arguments, name) for name in vars(Shape())}), arguments.seed)


if __name__ == "__main__":
    main()
