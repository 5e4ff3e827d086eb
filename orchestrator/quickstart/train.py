"""Make the quickstart's model: ``python -m orchestrator.quickstart.train OUT``.

A byte-level BPE tokenizer (2048 tokens) and a small Llama (1.4 M parameters, tied embeddings), trained from scratch on
the training part of the standard library's sources with AdamW (arXiv:1711.05101, decoupled weight decay) under a
linear warm-up and a cosine. The recipe is fixed: on the same Python, torch and kind of CPU it gives the same bytes.
It takes about 40 minutes on one core. OUT is a Hugging Face folder from the first evaluation on, so that a run that
was cut short leaves a model that is usable, if worse.

Shapes: B windows in a batch, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.quickstart.corpus import DOCUMENT_END, write_corpus

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint's bytes, besides the text and the libraries."""

    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    positions: int = 512
    window: int = 256  # tokens
    batch: int = 8  # windows
    steps: int = 4400
    warmup: int = 200  # steps
    learning_rate: float = 2e-3
    final_fraction: float = 0.05  # of the learning rate, at the last step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # of matrices; vectors have none
    clip: float = 1.0  # norm of the gradient
    seed: int = 1
    evaluate_every: int = 400  # steps


def train_tokenizer(text: str, recipe: Recipe) -> Tokenizer:
    """A byte-level BPE of the text's modules; every string of bytes that is UTF-8 survives encoding and decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(DOCUMENT_END), trainer)
    return tokenizer


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model in float32; the initial weights are the seed's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def windows(tokens_N: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Batches ids_BT without end: all windows in a random order, then again from another offset; the seed decides."""
    import torch

    if len(tokens_N) < (recipe.batch + 1) * recipe.window:
        raise ValueError(f"{len(tokens_N)} tokens are less than one batch")
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.window, (), generator=generator))
        count = (len(tokens_N) - offset) // recipe.window
        rows_NT = tokens_N[offset : offset + count * recipe.window].view(count, recipe.window)
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - recipe.batch + 1, recipe.batch):
            yield rows_NT[order[start : start + recipe.batch]]


def mean_loss(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each token but the first of its window, given those before it."""
    from torch.nn.functional import cross_entropy

    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def perplexity(model: LlamaForCausalLM, tokens_N: torch.Tensor, window: int, limit: int | None = None) -> float:
    """Of consecutive windows without a start token, each predicted alone; at most `limit` of them, from all over."""
    import torch

    count = len(tokens_N) // window
    rows_NT = tokens_N[: count * window].view(count, window)
    rows_NT = rows_NT[:: max(1, count // (limit or count))][:limit]
    with torch.inference_mode():
        losses = [mean_loss(model, ids_BT) * len(ids_BT) for ids_BT in torch.split(rows_NT, 16)]
    return math.exp(float(sum(losses)) / len(rows_NT))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear to its peak over the warm-up, then half a cosine down to `final_fraction` of it."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * (recipe.final_fraction + (1 - recipe.final_fraction) * cosine)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the Hugging Face folder, weights in bfloat16; the same bytes for the same model."""
    from transformers import GenerationConfig

    out.mkdir(parents=True, exist_ok=True)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    copy.bfloat16()
    copy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": DOCUMENT_END,
        "eos_token": DOCUMENT_END,
        "pad_token": DOCUMENT_END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train(out: Path, recipe: Recipe, train_text: str, valid_text: str) -> None:
    """Train on one thread, which alone repeats sums in the same order, and write the folder; progress to stderr.

    The texts are modules with DOCUMENT_END after each; the held-out one is only ever measured.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(train_text, recipe)
    train_N = torch.tensor(tokenizer.encode(train_text).ids)
    valid_N = torch.tensor(tokenizer.encode(valid_text).ids)
    model = new_model(recipe)
    parameters = list(model.parameters())
    _say(f"{len(train_N)} training and {len(valid_N)} held-out tokens, {sum(p.numel() for p in parameters)} parameters")
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    began, recent = time.monotonic(), []
    for step, ids_BT in zip(range(recipe.steps), windows(train_N, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = mean_loss(model, ids_BT)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        recent.append(float(loss.detach()))
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            held_out = perplexity(model, valid_N, recipe.window, None if step + 1 == recipe.steps else 100)
            export(model, tokenizer, out)
            _say(
                f"step {step + 1}/{recipe.steps}  {time.monotonic() - began:.0f} s  "
                f"training loss {sum(recent) / len(recent):.3f}  held-out perplexity {held_out:.3f}"
            )
            recent.clear()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart's model.")
    parser.add_argument("out", type=Path, help="the folder to write the model to")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        files = write_corpus(Path(folder))
        train_text, valid_text = files.train.read_text(encoding="utf-8"), files.valid.read_text(encoding="utf-8")
    train(out, Recipe(), train_text, valid_text)


if __name__ == "__main__":
    main()
