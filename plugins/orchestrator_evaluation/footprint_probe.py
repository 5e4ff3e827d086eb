"""Load one model with stock Transformers in a process of its own, let it write, and print what that took as JSON.

    echo "decode" | python -P footprint_probe.py FOLDER --dtype auto --new-tokens 64

One line when the model is loaded, one for each line ``decode`` or ``decode BATCH`` on stdin, one at the end: so two of
these can take turns. Run by `footprint`, as a file, so that nothing of this project is in the process that is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 16


def peak_memory_bytes() -> int:
    """The largest resident memory that this process ever had, bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, this does not count what the parent held before exec
        match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Load, decode when asked, and print JSON lines."""
    parser = argparse.ArgumentParser(description="Measure what loading and running a model takes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if options.threads:
        torch.set_num_threads(options.threads)
    # Transformers imports an architecture's code, and compressed-tensors, only when a model needs them: seconds that
    # would drown the loading of a small model.
    trusted = options.trust_remote_code
    config = AutoConfig.from_pretrained(options.folder, local_files_only=True, trust_remote_code=trusted)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    if hasattr(config, "quantization_config"):
        import compressed_tensors  # noqa: F401
        from transformers.quantizers import quantizer_compressed_tensors  # noqa: F401

    start = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=options.dtype, local_files_only=True, trust_remote_code=trusted, use_safetensors=True
    )
    load_seconds = time.perf_counter() - start
    model: Any = loaded.eval()

    rows = model.get_input_embeddings().weight.shape[0]

    def seconds(new_tokens: int, batch: int = 1) -> float:
        """Time to write this many tokens after each of the prompts."""
        prompt = torch.arange(batch * PROMPT_TOKENS).remainder(rows).view(batch, PROMPT_TOKENS)
        begin = time.perf_counter()
        # `min_new_tokens`: an end token must not make a run shorter.
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        if written.shape[1] != PROMPT_TOKENS + new_tokens:
            raise RuntimeError(f"{written.shape[1] - PROMPT_TOKENS} tokens were written instead of {new_tokens}")
        return time.perf_counter() - begin

    seconds(1)  # warm up
    answer({"load_seconds": load_seconds})
    for line in sys.stdin:
        command, _, number = line.strip().partition(" ")
        if command == "decode":
            batch = int(number or 1)
            # The first new token is the prompt's: what remains is decoding alone.
            first, whole = seconds(1, batch), seconds(1 + options.new_tokens, batch)
            answer(
                {
                    "tokens_per_second": batch * options.new_tokens / max(whole - first, 1e-9),
                    "first_token_seconds": first,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
            )
    answer({"peak_memory_bytes": peak_memory_bytes()})


def answer(measured: dict[str, float]) -> None:
    """Print one JSON line at once."""
    print(json.dumps(measured), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
