"""One compression by this project, through its command line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cases import DAMPING, GROUP_SIZE, Case
from benchmarks.processes import RunError, environment, run


@dataclass(frozen=True)
class Calibration:
    """What everybody calibrates on: windows of a text, drawn with seed 0."""

    text: Path
    sequences: int
    length: int


def step_of(case: Case, inputs: str = "propagated") -> dict[str, Any]:
    """Return the case as a step of a specification."""
    return {**_plain_step(case), "inputs": inputs}


def _plain_step(case: Case) -> dict[str, Any]:
    if case.method == "gptq":
        return {
            "quantize": "gptq",
            "with": {
                "num_bits": case.num_bits,
                "group_size": GROUP_SIZE,
                "damping": DAMPING,
            },
        }
    if case.method == "awq":
        return {
            "quantize": "awq",
            "with": {"num_bits": case.num_bits, "group_size": GROUP_SIZE, "symmetric": case.symmetric},
        }
    pattern = {"pattern": "{}:{}".format(*case.pattern)} if case.pattern else {"sparsity": 0.5}
    return {"prune": case.method, "with": pattern | ({"damping": DAMPING} if case.method == "sparsegpt" else {})}


def compress(
    model: Path, calibration: Calibration, step: dict[str, Any], folder: Path, home: Path, **more: Any
) -> dict[str, Any]:
    """Calibrate and compress; return what `run --json` says, and `process_seconds`. Raises `RunError`.

    home: where results are kept; what is there from an earlier call is not computed again. more: keys of the
    specification.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sample = {
        "source": str(calibration.text),
        "sequences": calibration.sequences,
        "length_tokens": calibration.length,
    }
    steps = [{"calibrate": "text", "with": sample}, step]
    spec = {"version": 1, "name": "benchmark", "model": {"id": str(model)}, "seed": 0, "steps": steps, **more}
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    variables = environment(ORCHESTRATOR_HOME=str(home))
    variables.pop("MLFLOW_TRACKING_URI", None)
    finished = run([sys.executable, "-m", "orchestrator", "run", path, "--local", "--json"], variables)
    return {**json.loads(finished.stdout), "process_seconds": finished.seconds}


def peak_of(result: dict[str, Any]) -> int:
    """Largest peak of any step: the high-water mark is reset between steps."""
    return max(step["peak_memory_bytes"] for step in result["steps"])


def check_windows(result: dict[str, Any], windows: Path) -> None:
    """Raise `RunError` unless the calibration step drew exactly the windows that the peers read."""
    drawn = Path(result["steps"][0]["artifact"]["path"]) / "tokens.safetensors"
    if _tensor_bytes(drawn) != _tensor_bytes(windows):
        raise RunError("calibrated on other windows than the peers")


def _tensor_bytes(path: Path) -> bytes:
    """What follows the header of a safetensors file, whose first 8 bytes are its length. Saves importing torch."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
