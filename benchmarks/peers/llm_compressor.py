"""Runner of llm-compressor, in its own environment."""

from __future__ import annotations

import os

from benchmarks.cases import BLOCK_SIZE, DAMPING, GROUP_SIZE
from benchmarks.peers.job import Job, execute

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(job: Job):
    """Return the whole model, as `oneshot` wants it."""
    dtype = torch.float32 if job.dtype == "float32" else "auto"
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, device_map="cpu")


def modifier_of(job: Job):
    """Return the case in its words. Columns in their own order, as all others take them, which is not its default."""
    if job.case.method == "wanda":
        n, m = job.case.pattern or (0, 0)
        return WandaPruningModifier(
            sparsity=0.5, mask_structure=f"{n}:{m}", targets=["Linear"], ignore=["re:.*lm_head"]
        )
    weights = QuantizationArgs(
        num_bits=job.case.num_bits, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE
    )
    return GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        block_size=BLOCK_SIZE,
        dampening_frac=DAMPING,
        actorder=None,
    )


def compress(job: Job, model) -> None:
    """Calibrate on exactly the windows given: nothing tokenized again, padded, cut or shuffled."""
    tokens_NT = job.tokens_NT()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens_NT.tolist()]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=[modifier_of(job)],
        dataset=Dataset.from_list(rows),
        num_calibration_samples=tokens_NT.shape[0],
        max_seq_length=tokens_NT.shape[1],
        shuffle_calibration_samples=False,
        pad_to_max_length=False,
    )
    model.save_pretrained(job.out, save_compressed=True)
    tokenizer.save_pretrained(job.out)


if __name__ == "__main__":
    execute(load, compress, "llmcompressor", "compressed-tensors")
