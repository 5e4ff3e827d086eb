"""What every runner of a peer does: read its job from the command line, time the compression, report.

Only the compression proper is timed: from the loaded model to the compressed checkpoint on disk. The process around
it is timed by whoever started it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from benchmarks.cases import CASES, Case
from benchmarks.peak import peak_bytes

if TYPE_CHECKING:
    import torch

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Job:
    """model: folder of the dense checkpoint. windows: safetensors with `tokens_NT`. out: folder of the result.
    dtype: what the model is loaded in, "float32" or "auto", the checkpoint's own."""

    model: Path
    windows: Path
    case: Case
    out: Path
    dtype: str

    def tokens_NT(self) -> torch.Tensor:
        """The calibration windows, N sequences of T tokens."""
        from safetensors.torch import load_file

        return load_file(self.windows)["tokens_NT"]


def execute(load: Callable[[Job], Loaded], compress: Callable[[Job, Loaded], None], *packages: str) -> None:
    """Load, compress, and write seconds, peak memory and the versions of `packages` to the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("out", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "auto"))
    arguments = parser.parse_args()
    job = Job(arguments.model, arguments.windows, CASES[arguments.case], arguments.out, arguments.dtype)
    loaded = load(job)
    start = time.perf_counter()
    compress(job, loaded)
    report = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
    }
    arguments.report.write_text(json.dumps(report), encoding="utf-8")
