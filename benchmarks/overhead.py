"""What orchestration costs: commands that compute nothing, beside the cheapest thing a Python program can do.

    python -m benchmarks.overhead [--repeats 5] [--steps 100] [--save]

Runs, each in a fresh process and round-robin so that load hits all alike: an empty interpreter, `import torch`,
`orchestrator --help`, `plan` and `run` of a fully cached specification (locally, and through Prefect's embedded
server). Prints medians and their ratio to `import torch`. The specification has six steps over the quickstart's model.
Then what a computed step costs beside its method, split by where it goes: see steps.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import steps
from orchestrator.quickstart import prepare

SPEC = """\
version: 1
name: overhead
model: {id: model}
steps:
  - calibrate: text
    with: {source: valid.txt, sequences: 8, length_tokens: 64}
  - prune: magnitude
    with: {sparsity: 0.5}
  - quantize: rtn
    with: {num_bits: 4, group_size: 128}
  - validate: perplexity
    with: {source: valid.txt, length_tokens: 64, windows: 4}
  - validate: fidelity
    with: {source: valid.txt, length_tokens: 64, windows: 4}
  - register: release
"""
BASELINE = "import torch"


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of one process. Raises `CalledProcessError` if it fails."""
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print the table, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder / "material")
        spec = folder / "material" / "overhead.yaml"
        spec.write_text(SPEC, encoding="utf-8")
        environment = {**os.environ, "ORCHESTRATOR_HOME": str(folder / "home")}
        environment.pop("MLFLOW_TRACKING_URI", None)
        program = [sys.executable, "-m", "orchestrator"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            BASELINE: [sys.executable, "-c", "import torch"],
            "orchestrator --help": [*program, "--help"],
            "orchestrator plan, cached": [*program, "plan", str(spec)],
            "orchestrator run --local, cached": [*program, "run", str(spec), "--local"],
            "orchestrator run (Prefect), cached": [*program, "run", str(spec)],
        }
        subprocess.run([*program, "run", str(spec)], env=environment, check=True, stdout=subprocess.DEVNULL)
        measured: dict[str, list[float]] = {label: [] for label in commands}
        for _ in range(arguments.repeats):
            for label, command in commands.items():
                measured[label].append(seconds_of(command, environment))
    medians = {label: statistics.median(times) for label, times in measured.items()}
    print(f"{'':<38}{'median s':>10}{'/ import torch':>16}")
    for label, median in medians.items():
        print(f"{label:<38}{median:>10.2f}{median / medians[BASELINE]:>16.2f}")
    per_step = steps.measure(arguments.steps)
    steps.show(per_step)
    if arguments.save:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()[0]},
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("compression-orchestrator", "torch", "transformers", "prefect", "mlflow")
            },
            "repeats": arguments.repeats,
            "seconds": {label: [round(value, 3) for value in values] for label, values in measured.items()},
            "per_computed_step": per_step,
            "median_ratio_to_import_torch": {label: round(m / medians[BASELINE], 3) for label, m in medians.items()},
        }
        path = Path(__file__).parent / "results" / "overhead.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
