"""What methods are tried on: a text file, a tiny Llama with its own tokenizer, the same pruned 2:4, and in 4 bits.

Made on the spot from a seed, in a folder of the caller, in about a second; nothing is downloaded.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.canonical import file_sha256
from orchestrator.checkpoint import SINGLE_WEIGHT_FILE, Checkpoint
from orchestrator.export import ModelWriter
from orchestrator.method import Context, Invariant
from orchestrator.model import quiet
from orchestrator.reader import TensorReader
from orchestrator.scheme import QuantizedWeight, QuantScheme
from orchestrator.text import token_windows

if TYPE_CHECKING:
    from orchestrator.calibration import CalibrationSet

_SEED = 20_240_501
_SENTENCES = 1500
_SUBJECTS = ("the model", "a layer", "every row", "one column", "the teacher", "a student", "the scale", "her cat")
_VERBS = ("keeps", "loses", "rounds", "prunes", "learns", "writes", "reads", "packs", "finds", "measures", "forgets")
_OBJECTS = ("its weights", "a zero", "the largest token", "two of four", "an outlier", "nothing", "the error", "all")
_VOCABULARY = 384


@dataclass(frozen=True)
class Laboratory:
    """dense: float32, random weights. pruned: the same with at most two of four neighbouring block weights kept.

    quantized: the same with every layer in the blocks on a grid of 4 bits.
    """

    folder: Path
    text: Path
    dense: Checkpoint
    pruned: Checkpoint
    quantized: Checkpoint

    @classmethod
    def build(cls, folder: Path) -> Laboratory:
        """Make everything below `folder`. The global random state is put back afterwards."""
        import torch

        text = folder / "text.txt"
        text.write_text(_text(), encoding="utf-8")
        dense = folder / "dense"
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(_SEED)
            _make_model().save_pretrained(dense)
            _make_tokenizer(text).save_pretrained(dense)
        pruned = folder / "pruned"
        shutil.copytree(dense, pruned)
        _prune(Checkpoint(pruned))
        _quantize(Checkpoint(dense), folder / "quantized")
        return cls(folder, text, *(Checkpoint(folder / name) for name in ("dense", "pruned", "quantized")))

    def calibration(self, source: str | None = None, seed: int = 0) -> CalibrationSet:
        """Sixteen windows of 32 tokens of the text, or of another."""
        return token_windows(
            source or str(self.text), self.dense.load_tokenizer(), num_sequences=16, length=32, seed=seed
        )

    def context(
        self,
        seed: int,
        calibration: CalibrationSet | None,
        progress: Callable[[float, str], None],
        student: Checkpoint | None = None,
    ) -> Context:
        """A context as the core makes it, with an empty scratch folder. student: what the step reads."""
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        held = {self.pruned: Invariant.ZEROS, self.quantized: Invariant.GRID}.get(student or self.dense)
        return Context(
            seed,
            self.dense,
            calibration,
            scratch,
            progress,
            checkpoint=student,
            held=frozenset({held}) if held else frozenset(),
        )

    def digests(self) -> dict[str, str]:
        """sha256 of the text and of every file of the models."""
        models = (self.dense, self.pruned, self.quantized)
        files = [self.text, *(path for model in models for path in model.path.rglob("*"))]
        return {str(path.relative_to(self.folder)): file_sha256(path) for path in sorted(files) if path.is_file()}


def _text() -> str:
    draw = random.Random(_SEED)
    sentences = (
        f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)}, {draw.randrange(100)} times."
        for _ in range(_SENTENCES)
    )
    return "\n".join(sentences) + "\n"


def _make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32_768,  # any context length that a serving engine has as its default
        initializer_range=0.15,  # far enough from zero for the logits to differ from token to token
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def _make_tokenizer(text: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text of a plugin author can be tokenized
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _prune(checkpoint: Checkpoint) -> None:
    """Set the two smallest of every four neighbouring weights of the block linears to zero, in place on disk."""
    from safetensors.torch import load_file, save_file

    path = checkpoint.path / SINGLE_WEIGHT_FILE
    tensors = load_file(path)
    for layer in checkpoint.block_layers():
        weight_OI = tensors[f"{layer.name}.weight"]
        runs_XM = weight_OI.view(-1, 4)
        runs_XM.scatter_(1, runs_XM.abs().argsort(dim=1)[:, :2], 0.0)
    save_file(tensors, path, {"format": "pt"})


def _quantize(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the model with the layers in its blocks rounded to 4 bits, one scale for each row."""
    import torch

    scheme = QuantScheme(num_bits=4, strategy="channel", group_size=None)
    with closing(ModelWriter(checkpoint, folder, scheme=scheme)) as writer, TensorReader(checkpoint) as read:
        for layer in checkpoint.block_layers():
            weight_OI = read(f"{layer.name}.weight")
            scale_O1 = weight_OI.abs().amax(1, keepdim=True) / scheme.quant_max
            q_OI = (weight_OI / scale_O1).round().to(torch.int8)
            writer.add_quantized(layer.name, QuantizedWeight(q_OI, scale_O1, None, scheme))
        writer.finish()
