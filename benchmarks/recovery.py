"""What each way to distill wins back of the perplexity that compression lost, and how fast.

    python -m benchmarks.recovery [--damages NAME ...] [--presets NAME ...] [--home DIR] [--quick] [--save]

Four damages of reference-7m: half of the weights (Wanda), a fifth of the MLP channels (LLM-Pruner, without its own
recovery), 3 bits and 2 bits (GPTQ). Each preset trains each of them for the same number of updates of as many windows,
with its own defaults otherwise but the exams, of which there are three, and the learning rate, which suits the size of
the model (of MiniLLM, whose gradients are noisier, half of it). The share won back is

    (perplexity damaged - perplexity trained) / (perplexity damaged - perplexity dense)

on held-out text, by one evaluator (stock Transformers, float32). A minute of compute is a minute of the step, the
teacher's pass and the student's writing included, the import of libraries not. Every damage has a home of its own, so
that the cache of the teacher is made anew in each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.chains import Kitchen
from benchmarks.closeness import Evaluator
from benchmarks.conformance_models import reference_7m
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
DAMAGES: dict[str, dict[str, Any]] = {
    "wanda 50 %": {"prune": "wanda", "with": {"sparsity": 0.5}},
    "llm_pruner 20 %": {"prune": "llm_pruner", "with": {"ratio": 0.2, "attention": False, "lora_rank": 0}},
    "gptq 3 bits": {"quantize": "gptq", "with": {"num_bits": 3, "group_size": 128}},
    "gptq 2 bits": {"quantize": "gptq", "with": {"num_bits": 2, "group_size": 64}},
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "logits": ("logits", {}),
    "logits, cached": ("logits", {"teacher_top_k": 64}),
    "gkd": ("gkd", {}),
    "distillm": ("distillm", {}),
    "minillm": ("minillm", {"learning_rate": 1.5e-4}),
    "qat": ("qat", {}),
    "qad": ("qad", {}),
}
ON_GRIDS = ("qat", "qad")
UPDATES, BATCH, WINDOWS, LENGTH, CALIBRATION = 24, 4, 128, 256, 64
LEARNING_RATE, EXAMINE_EVERY = 3e-4, 8


def main() -> None:
    """Damage, train, evaluate, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--damages", nargs="+", choices=list(DAMAGES), default=list(DAMAGES))
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--home", type=Path, help="where results are kept, and found by a later call; default: nowhere")
    parser.add_argument("--quick", action="store_true", help="few updates: does everything run?")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/recovery.json")
    arguments = parser.parse_args()
    updates = 2 if arguments.quick else UPDATES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = (arguments.home or folder / "home").absolute()
        found = recover(arguments.damages, arguments.presets, updates, folder, home)
    show(found)
    if arguments.save:
        shape = {"updates": updates, "windows": BATCH, "length_tokens": LENGTH, "learning_rate": LEARNING_RATE}
        results.save("recovery", {**results.circumstances(), "quick": arguments.quick, "training": shape, **found})


def recover(damages: list[str], presets: list[str], updates: int, folder: Path, home: Path) -> dict[str, Any]:
    """Return the dense model's figures and those of each damage, untrained and trained."""
    from safetensors.torch import load_file

    material = reference_7m(folder, quick=False)
    evaluate = Evaluator(Checkpoint(material.model).load(), load_file(material.held_out)["tokens_NT"])
    dense = evaluate.dense
    print(f"dense: perplexity {dense.perplexity:.3f}", flush=True)
    text = str(material.calibration.text)
    calibrate = {"calibrate": "text", "with": {"source": text, "sequences": CALIBRATION, "length_tokens": LENGTH}}
    found: dict[str, Any] = {}
    for damage in damages:
        kitchen = Kitchen(material.model, folder, home / damage.replace(" ", "-").replace("%", "percent"))
        damaged = evaluate(kitchen.run([calibrate, DAMAGES[damage]], 0)[0].load())
        print(f"{damage}: perplexity {damaged.perplexity:.3f}", flush=True)
        rows: dict[str, Any] = {}
        for preset in presets:
            if preset in ON_GRIDS and "quantize" not in DAMAGES[damage]:
                continue
            method, changes = PRESETS[preset]
            training = {
                "source": text,
                "sequences": WINDOWS,
                "length_tokens": LENGTH,
                "updates": updates,
                "batch_sequences": BATCH,
                "learning_rate": LEARNING_RATE,
                "examine_every": EXAMINE_EVERY,
                **changes,
            }
            try:
                made, step = kitchen.run([calibrate, DAMAGES[damage], {"distill": method, "with": training}], 0)
            except OrchestratorError as error:
                rows[preset] = {"failed": str(error)}
                print(f"{damage}, {preset}: {error}", flush=True)
                continue
            trained = evaluate(made.load())
            seconds = step["seconds"] - step["import_seconds"]
            share = (damaged.perplexity - trained.perplexity) / (damaged.perplexity - dense.perplexity)
            rows[preset] = {
                **trained.record(),
                "seconds": seconds,
                "peak_bytes": step["peak_memory_bytes"],
                "share": share,
                "share_per_minute": share / (seconds / 60),
                "best_update": step["metrics"]["best_update"],
                "found": step["cached"],
                "changed_parameters": changes,
            }
            print(f"{damage}, {preset}: perplexity {trained.perplexity:.3f}, {seconds:.0f} s", flush=True)
        found[damage] = {"damaged": damaged.record(), "trained": rows}
    return {"dense": dense.record(), "damages": found}


def show(found: dict[str, Any]) -> None:
    """Print one table for each damage."""
    for damage, facts in found["damages"].items():
        print(f"\n{damage}: perplexity {facts['damaged']['perplexity']:.3f}, dense {found['dense']['perplexity']:.3f}")
        print(f"{'':<18}{'perplexity':>12}{'KL':>9}{'won back':>10}{'seconds':>9}{'a minute':>10}{'best':>6}")
        for preset, row in facts["trained"].items():
            if "failed" in row:
                print(f"{preset:<18}{row['failed'].splitlines()[0][:80]}")
                continue
            closeness = f"{preset:<18}{row['perplexity']:>12.3f}{row['kl']:>9.4f}{row['share']:>10.1%}"
            print(f"{closeness}{row['seconds']:>9.0f}{row['share_per_minute']:>10.1%}{row['best_update']:>6.0f}")


if __name__ == "__main__":
    main()
