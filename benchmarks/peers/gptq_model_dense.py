"""Turn what GPTQModel saved into plain float32 weights, so that the same stock Transformers evaluates every result.

python -m benchmarks.peers.gptq_model_dense PACKED DENSE_MODEL OUT
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Put its dequantized weights in the places of the dense model's."""
    packed, dense_model, out = sys.argv[1:]
    quantized = GPTQModel.load(packed, device="cpu", backend=BACKEND.TORCH).model
    dense = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    replaced = 0
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if hasattr(module, "dequantize_weight"):
                weight_OI = module.dequantize_weight().T.float()
                dense.get_submodule(name).weight.copy_(weight_OI)
                replaced += 1
    blocks = sum(isinstance(m, torch.nn.Linear) for m in dense.model.layers.modules())
    if replaced != blocks:
        raise SystemExit(f"{replaced} of {blocks} layers were quantized")
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(dense_model).save_pretrained(out)


if __name__ == "__main__":
    main()
