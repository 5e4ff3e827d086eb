"""What a model costs: bytes on disk, time to load, speed of writing, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from orchestrator.api import Checkpoint, Context, Evaluator, Stage, StepError

_MEASURED = {
    "bytes_on_disk": "bytes of all files of the model folder, tokenizer included",
    "weight_bytes": "bytes of the weight files",
    "load_seconds": "seconds that `from_pretrained` takes in a fresh process, libraries already imported",
    "tokens_per_second": "new tokens per second of greedy decoding, batch 1, after the prompt (median of the repeats)",
    "peak_memory_bytes": "largest resident memory of the process, bytes; Python and the libraries included",
}


class Footprint(Evaluator):
    """Both models measured the way a user of stock Transformers meets them, each in a process of its own."""

    stage: ClassVar = Stage.VALIDATE
    name: ClassVar = "footprint"
    paper: ClassVar = "No paper: file sizes, wall-clock time and the kernel's high-water mark of resident memory."
    metrics: ClassVar[Mapping[str, str]] = {
        **{name: f"{what}; compressed model" for name, what in _MEASURED.items()},
        **{f"dense_{name}": f"{what}; dense model" for name, what in _MEASURED.items()},
        **{f"{name}_ratio": f"{name} / dense_{name}" for name in _MEASURED},
    }

    new_tokens: int = Field(64, ge=1, le=100_000, description="Tokens decoded in each timed run.")
    repeats: int = Field(3, ge=1, le=100, description="Timed runs; the median counts.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="dtype to load in; 'auto' is what config.json says, as a user would get it."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="Threads to compute with. Default: PyTorch's choice.")
    timeout_seconds: float = Field(3600.0, gt=0, description="Longest time for one of the two processes, seconds.")

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        """Measure one model after the other. Raises `StepError` if a process fails or takes too long."""
        result: dict[str, float] = {}
        for index, (prefix, checkpoint) in enumerate((("dense_", baseline), ("", candidate))):
            context.progress(index / 2, f"loading and running the {'dense' if prefix else 'compressed'} model")
            result |= {f"{prefix}{name}": value for name, value in self._measure(checkpoint).items()}
        for name in _MEASURED:
            result[f"{name}_ratio"] = result[name] / result[f"dense_{name}"]
        context.progress(1.0, "both models measured")
        return result

    def _measure(self, checkpoint: Checkpoint) -> dict[str, float]:
        sizes = {
            "bytes_on_disk": float(sum((checkpoint.path / name).stat().st_size for name in checkpoint.model_files())),
            "weight_bytes": float(checkpoint.weight_bytes()),
        }
        measured = self._probe(checkpoint)
        return sizes | {name: float(measured[name]) for name in _MEASURED if name not in sizes}

    def _probe(self, checkpoint: Checkpoint) -> dict[str, float]:
        dtype = checkpoint.dtype if self.dtype == "auto" else self.dtype
        probe = Path(__file__).with_name("footprint_probe.py")
        # -P: the probe's folder must not become a place to import from; its modules have common names.
        command = [sys.executable, "-P", str(probe), str(checkpoint.path), "--dtype", dtype]
        command += ["--new-tokens", str(self.new_tokens), "--repeats", str(self.repeats)]
        if self.threads is not None:
            command += ["--threads", str(self.threads)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=self.timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise StepError(
                f"loading and running {checkpoint.path} took longer than {self.timeout_seconds:g} s",
                remedy="raise `timeout_seconds`, or lower `new_tokens` or `repeats`",
            ) from None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
            died = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise StepError(
                f"stock Transformers could not load and run {checkpoint.path} ({died}): {lines[-1]}",
                remedy="free memory if the process was killed (signal 9); otherwise the model folder is damaged",
            )
        measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return measured
