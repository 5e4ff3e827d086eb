"""Mixed precision beside uniform precision, at equal bytes on disk; and how fast another budget is solved.

    python -m benchmarks.mixed [--model reference-7m|quickstart|stories260k ...] [--save]

For each uniform width, `quantize: mixed` gets the bytes that the weight files of `quantize: gptq` took as its budget,
on the same windows. Both are evaluated by one evaluator on held-out windows: perplexity, and the KL divergence from the
dense model, beside which stands what the method had estimated. Solving alone is timed on tables as large as those of
models of 32 and 80 blocks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ours, results, targets
from benchmarks.closeness import Evaluator
from benchmarks.conformance_models import MODELS
from benchmarks.processes import RunError
from benchmarks.targets import Target
from orchestrator.checkpoint import Checkpoint
from orchestrator_quantization.knapsack import choose_within

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WIDTHS = (2, 3, 4)
GROUPS: dict[str, int | None] = {"reference-7m": 128, "quickstart": 128, "stories260k": None}
# The layers of Llama 2 7B and Llama 3 70B that share a choice: q/k/v, o, gate/up, down.
SHAPES = {
    "32 blocks": (32, (3 * 4096 * 4096, 4096 * 4096, 2 * 4096 * 11008, 4096 * 11008)),
    "80 blocks": (80, (10240 * 8192, 8192 * 8192, 2 * 8192 * 28672, 8192 * 28672)),
}
BITS = (2, 3, 4, 5, 6, 8)


def main() -> None:
    """Run, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/mixed.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = compare(name, Path(folder))
    solved = {name: solving_seconds(*shape) for name, shape in SHAPES.items()}
    for name, seconds in solved.items():
        print(f"another budget, {name}: {seconds:.3f} s")
    aimed = [target for name, rows in found.items() for target in aims(name, rows)]
    aimed += [Target(f"seconds to solve another budget, {name}", 1.0, seconds) for name, seconds in solved.items()]
    targets.show(aimed)
    if arguments.save:
        results.save(
            "mixed",
            {
                **results.circumstances(),
                "models": found,
                "solving_seconds": solved,
                "targets": [target.record() for target in aimed],
            },
        )


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Quantize one model both ways at each width; return what came out."""
    from safetensors.torch import load_file

    material = MODELS[name](folder, quick=False)
    evaluate = Evaluator(Checkpoint(material.model).load(), load_file(material.held_out)["tokens_NT"])
    rows: dict[str, Any] = {"dense": evaluate.dense.record()}
    print(f"\n{name}\n{'':<12}{'bytes':>12}{'perplexity':>12}{'KL':>10}{'estimated':>11}{'seconds':>9}")
    print(f"{'dense':<12}{Checkpoint(material.model).weight_bytes():>12,}{evaluate.dense.perplexity:>12.3f}")

    def run(label: str, step: dict[str, Any]) -> dict[str, Any]:
        done = ours.compress(material.model, material.calibration, step, folder / "spec", folder / "home")["steps"][1]
        result = Checkpoint(Path(done["artifact"]["path"]))
        row = {
            "bytes": result.weight_bytes(),
            **evaluate(result.load()).record(),
            "estimated_kl": done["metrics"].get("estimated_kl"),
            "seconds": done["seconds"] - done["import_seconds"],
        }
        guess = "" if row["estimated_kl"] is None else f"{row['estimated_kl']:.5f}"
        print(
            f"{label:<12}{row['bytes']:>12,}{row['perplexity']:>12.3f}{row['kl']:>10.5f}{guess:>11}{row['seconds']:>9.1f}",
            flush=True,
        )
        rows[label] = row
        return row

    for bits in WIDTHS:
        shared = {"group_size": GROUPS[name]}
        uniform = run(f"gptq {bits}", {"quantize": "gptq", "with": {"num_bits": bits, **shared}})
        run(f"mixed {bits}", {"quantize": "mixed", "with": {"budget": uniform["bytes"], "num_bits": BITS, **shared}})
    return rows


def aims(name: str, rows: dict[str, Any]) -> list[Target]:
    """Never worse, never larger."""
    aimed = []
    for bits in WIDTHS:
        uniform, mixed = rows[f"gptq {bits}"], rows[f"mixed {bits}"]
        for what in ("bytes", "kl", "perplexity"):
            label = f"{name}, budget of {bits} bits: {what} of mixed / uniform"
            aimed.append(Target(label, 1.0, mixed[what] / uniform[what]))
    return aimed


def solving_seconds(blocks: int, weights: tuple[int, ...]) -> float:
    """Median over budgets of the time to choose, on losses spread as layers' are."""
    rng = np.random.default_rng(0)
    count = np.tile(weights, blocks)
    sizes = (count[:, None] * (np.array(BITS) + 0.125) / 8).astype(int)
    losses = rng.lognormal(0, 1.5, (len(count), 1)) * 4.0 ** -np.array(BITS) * rng.lognormal(0, 0.1, sizes.shape)
    taken = []
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        begin = time.perf_counter()
        choose_within(sizes.tolist(), losses.tolist(), int(share * sizes.max(1).sum()))
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
