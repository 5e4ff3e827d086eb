"""What `plan` predicts, beside what `run` measures: memory, disk and time of each step.

    python -m benchmarks.preflight [--save]

First some specifications teach the rates of this machine, then others, with models and data of other sizes, are
judged: each in a fresh process, through the command line, with the predictions that `run --json` records. Targets:
peak memory and disk within 10 %, time within 30 %. Needs the shared models (`ORCHESTRATOR_SHARED_DATA`, default
../shared/data); a Llama of random weights stands for larger ones.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA", "../shared/data"))
TEXT = SHARED / "text" / "wikitext2-valid.txt"
TARGETS = {"peak_memory_bytes": 0.10, "disk_bytes": 0.10, "seconds": 0.30}


@dataclass(frozen=True)
class Case:
    """One specification: model folder, calibration sequences and length, evaluated windows, distillation updates."""

    model: str
    sequences: int
    length: int
    windows: int
    updates: int = 0

    def spec(self, folder: Path) -> str:
        """The specification as YAML."""
        text = TEXT.absolute()
        distill = (
            f"  - distill: logits\n    with: {{updates: {self.updates}, batch_sequences: 2, length_tokens: 128}}\n"
        )
        return f"""\
version: 1
name: preflight
model: {{id: {folder / self.model}}}
steps:
  - calibrate: text
    with: {{source: {text}, sequences: {self.sequences}, length_tokens: {self.length}}}
  - prune: wanda
    with: {{sparsity: 0.5}}
{distill if self.updates else ""}\
  - quantize: gptq
    with: {{num_bits: 4, group_size: null}}
  - validate: perplexity
    with: {{source: {text}, length_tokens: 128, windows: {self.windows}}}
"""

    def plain(self, folder: Path) -> str:
        """A second specification, of a method that needs no data."""
        return f"""\
version: 1
name: preflight-rtn
model: {{id: {folder / self.model}}}
steps:
  - quantize: rtn
    with: {{num_bits: 4, group_size: null}}
"""


LEARNED = [
    Case("stories260k", 64, 256, 32, updates=20),
    Case("reference-7m", 64, 256, 64, updates=15),
    Case("reference-7m", 192, 256, 32),
    Case("random-384", 64, 256, 16, updates=5),
]
JUDGED = [
    Case("stories260k", 128, 128, 64, updates=40),
    Case("reference-7m", 128, 512, 128, updates=30),
    Case("random-768", 32, 256, 24, updates=6),
    Case("random-768", 96, 256, 48),
]


def make_random_llama(folder: Path, hidden: int, layers: int) -> None:
    """Write a Llama of random weights, bfloat16, with the tokenizer of reference-7m."""
    code = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=4096, hidden_size={hidden}, intermediate_size={hidden * 3}, num_hidden_layers={layers},
    num_attention_heads={hidden // 64}, num_key_value_heads={hidden // 128}, max_position_embeddings=512,
    tie_word_embeddings=True)
LlamaForCausalLM(config).bfloat16().save_pretrained({str(folder)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHARED / "models" / "reference-7m" / name, folder / name)


def measured(spec: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run a specification; return its computed steps as `run --json` prints them."""
    command = [sys.executable, "-m", "orchestrator", "run", "--local", "--json", str(spec)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{spec}:\n{done.stderr}")
    return [step for step in json.loads(done.stdout)["steps"] if not step["cached"]]


def compared(case: Case, step: dict[str, Any]) -> dict[str, Any]:
    """Prediction, measurement and error (predicted / measured - 1) of one step."""
    row: dict[str, Any] = {
        "model": case.model,
        "tokens": case.sequences * case.length,
        "step": f"{step['stage']} {step['method']}",
    }
    for name in TARGETS:
        error = step["predicted"][name] / step[name] - 1
        row[name] = {"predicted": step["predicted"][name], "measured": step[name], "error": round(error, 3)}
    return row


def shown(row: dict[str, Any]) -> str:
    """One line of the table."""
    line = f"{row['model']:<13}{row['tokens']:>7} {row['step']:<20}"
    for name, scale, unit in (("peak_memory_bytes", 2**20, "MiB"), ("disk_bytes", 2**20, "MiB"), ("seconds", 1, "s")):
        found = row[name]
        met = "met" if abs(found["error"]) <= TARGETS[name] else "MISSED"
        numbers = f"{found['predicted'] / scale:.2f} / {found['measured'] / scale:.2f} {unit}"
        line += f"{numbers:>26} {found['error']:>+7.1%} {met:<6}"
    return line


def main() -> None:
    """Teach, judge, print the table, and save it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/preflight.json")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {"learned": [], "judged": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in ("stories260k", "reference-7m"):
            shutil.copytree(SHARED / "models" / model, folder / model)
        make_random_llama(folder / "random-384", 384, 6)
        make_random_llama(folder / "random-768", 768, 8)
        environment = {**os.environ, "ORCHESTRATOR_HOME": str(folder / "home")}
        environment.pop("MLFLOW_TRACKING_URI", None)
        spec = folder / "spec.yaml"
        for phase, cases in (("learned", LEARNED), ("judged", JUDGED)):
            print(f"\n{phase}: predicted / measured")
            for case in cases:
                for text in (case.spec(folder), case.plain(folder)):
                    spec.write_text(text, encoding="utf-8")
                    for step in measured(spec, environment):
                        rows[phase].append(compared(case, step))
                        print(shown(rows[phase][-1]), flush=True)
    summary = {}
    for metric, target in TARGETS.items():
        errors = sorted(abs(row[metric]["error"]) for row in rows["judged"])
        met = sum(error <= target for error in errors)
        summary[metric] = {"target": target, "met": met, "of": len(errors), "median": errors[len(errors) // 2]}
        summary[metric]["largest"] = errors[-1]
        print(
            f"{metric:<18} within {target:.0%}: {met} of {len(errors)}; median {errors[len(errors) // 2]:.1%}", end=""
        )
        print(f", largest {errors[-1]:.1%}")
    if arguments.save:
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()[0]},
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("compression-orchestrator", "torch", "transformers", "mlflow")
            },
            "summary": summary,
            **rows,
        }
        path = Path(__file__).parent / "results" / "preflight.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
