"""The one evaluator of every result: stock Transformers, float32, in a fresh process.

python -m benchmarks.perplexity MODEL WINDOWS
"""

from __future__ import annotations

import json
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BATCH = 4


def main() -> None:
    """Print perplexity and predicted tokens as JSON. A window has no start token; its first token is not predicted."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    folder, windows = sys.argv[1:]
    tokens_NT = load_file(windows)["tokens_NT"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens_BT in tokens_NT.split(BATCH):
            logits = model(tokens_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="sum").item()
            count += tokens_BT[:, 1:].numel()
    print(json.dumps({"perplexity": math.exp(total / count), "tokens": count}))


if __name__ == "__main__":
    main()
