"""The models of `benchmarks.conformance`, each with text of the kind that it was trained on.

reference-7m: Python sources that it has not seen. quickstart: its own training and held-out text. stories260k: no text
of its kind is here (on plays its perplexity is some twenty times what it is on stories), so it writes its own, story by
story at temperature 1; calibration and evaluation are different draws.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.material import shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.systems import make_windows
from orchestrator.quickstart import prepare

STORIES, STORY_TOKENS, STORIES_AT_ONCE = 128, 320, 64


@dataclass(frozen=True)
class Material:
    """windows, held_out: files of token windows. evaluated: how many are held out, of the calibration's length."""

    model: Path
    calibration: Calibration
    windows: Path
    held_out: Path
    evaluated: int

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        shape = {key: value for key, value in asdict(self.calibration).items() if key != "text"}
        return {"calibration": shape, "evaluated_windows": self.evaluated}


def prepared(
    model: Path, calibration: Path, evaluation: Path, folder: Path, sequences: int, length: int, evaluated: int
) -> Material:
    """Draw the windows."""
    windows, held_out = folder / "windows.safetensors", folder / "held-out.safetensors"
    make_windows(model, calibration, windows, sequences, length)
    make_windows(model, evaluation, held_out, evaluated, length, in_order=True)
    return Material(model, Calibration(calibration, sequences, length), windows, held_out, evaluated)


def reference_7m(folder: Path, *, quick: bool) -> Material:
    """Halves of `heldout-code.txt`."""
    texts = split_text(shared_data() / "text" / "heldout-code.txt", folder)
    shape = (4, 128, 4) if quick else (16, 512, 32)
    return prepared((shared_data() / "models" / "reference-7m").resolve(), *texts, folder, *shape)


def quickstart(folder: Path, *, quick: bool) -> Material:
    """The model that comes along, with its texts."""
    prepare(folder / "quickstart")
    texts = folder / "quickstart" / "train.txt", folder / "quickstart" / "valid.txt"
    return prepared(folder / "quickstart" / "model", *texts, folder, *((4, 64, 4) if quick else (32, 256, 64)))


def stories260k(folder: Path, *, quick: bool) -> Material:
    """Stories of its own."""
    model = (shared_data() / "models" / "stories260k").resolve()
    texts = folder / "calibration.txt", folder / "evaluation.txt"
    for seed, text in enumerate(texts):
        text.write_text("\n".join(stories(model, seed, 8 if quick else STORIES)), encoding="utf-8")
    return prepared(model, *texts, folder, *((4, 64, 4) if quick else (32, 256, 64)))


MODELS = {"reference-7m": reference_7m, "stories260k": stories260k, "quickstart": quickstart}


def stories(folder: Path, seed: int, count: int) -> list[str]:
    """Let a model write."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    start_B1 = torch.full((min(count, STORIES_AT_ONCE), 1), model.config.bos_token_id)
    written: list[str] = []
    while len(written) < count:
        tokens_BT = model.generate(
            start_B1,
            attention_mask=torch.ones_like(start_B1),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=STORY_TOKENS,
            pad_token_id=2,
        )
        written += tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
    return written[:count]
