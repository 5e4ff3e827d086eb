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
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(job: Job):
    """Return the whole model, as `oneshot` wants it."""
    dtype = torch.float32 if job.dtype == "float32" else "auto"
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, device_map="cpu")


def modifiers_of(job: Job):
    """Return the case in its words. Columns in their own order, as all others take them, which is not its default."""
    n, m = job.case.pattern or (0, 0)
    pruning = {
        "sparsity": 0.5,
        "mask_structure": f"{n}:{m}",
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    if job.case.method == "wanda":
        return [WandaPruningModifier(**pruning)]
    if job.case.method == "sparsegpt":
        return [SparseGPTModifier(**pruning, block_size=BLOCK_SIZE, dampening_frac=DAMPING)]
    weights = QuantizationArgs(
        num_bits=job.case.num_bits,
        type="int",
        symmetric=job.case.symmetric,
        strategy="group",
        group_size=GROUP_SIZE,
    )
    quantization = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if job.case.method == "awq":
        # It pins memory for an accelerator that is not there (`shared/recipes/awq_patch.py`).
        IntermediatesCache.pin_memory = lambda self, *arguments, **options: None
        return [AWQModifier(), QuantizationModifier(**quantization)]
    return [GPTQModifier(**quantization, block_size=BLOCK_SIZE, dampening_frac=DAMPING, actorder=None)]


def compress(job: Job, model) -> None:
    """Calibrate on exactly the windows given: nothing tokenized again, padded, cut or shuffled."""
    tokens_NT = job.tokens_NT()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens_NT.tolist()]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifiers_of(job),
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
