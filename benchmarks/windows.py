"""Write token windows as this project's calibrator makes them, for all to read.

python -m benchmarks.windows MODEL TEXT OUT --sequences N --length T [--in-order]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Write `tokens_NT`: the random windows of `calibrate: text` with seed 0, or the first ones in order."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--in-order", action="store_true")
    arguments = parser.parse_args()

    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from orchestrator.api import token_windows

    windows = token_windows(
        str(arguments.text),
        AutoTokenizer.from_pretrained(arguments.model),
        num_sequences=arguments.sequences,
        length=arguments.length,
        random=not arguments.in_order,
    )
    save_file({"tokens_NT": windows.tokens_NT}, arguments.out)


if __name__ == "__main__":
    main()
