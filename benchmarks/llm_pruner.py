"""LLM-Pruner's order of importance criteria on a trained model, with and without recovery.

    python -m benchmarks.llm_pruner [--cases NAME ...] [--home DIR] [--quick] [--save]

What the authors report of LLaMA-7B (arXiv:2305.11627, table 1) is an order: groups with the least L2 norm are the worst
choice (WikiText-2 perplexity 582), then those drawn at random (27.5), then those by Taylor expansion, vector-wise
(22.3) and element-wise (19.1); low-rank recovery brings back most of the loss.

Two cases: a fifth of the MLP channels, and half of the KV groups and of the MLP channels (of a Llama, whose config.json
takes no number of heads that does not divide its width, heads can only be halved). Recovery follows the dense model's
predictions, as is our default, or the next tokens, as the authors do, on the same windows. Each is one `orchestrator
run`; perplexity is that of stock Transformers in a fresh process. The first half of the text is for calibration and
recovery, the second for evaluation. A random choice is drawn with three seeds, of which the median counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import ours, results, targets
from benchmarks.material import shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.processes import environment, run
from benchmarks.systems import make_windows
from benchmarks.targets import Target

CASES: dict[str, dict[str, Any]] = {
    "MLP 0.2": {"ratio": 0.2, "attention": False},
    "heads and MLP 0.5": {"ratio": 0.5},
}
RANDOM, L2, RECOVERED, ON_TEXT = "random", "l2", "taylor + LoRA", "taylor + LoRA, next tokens"
VECTOR, ELEMENT = "taylor first vector", "taylor first element"
CRITERIA: dict[str, dict[str, Any]] = {
    RANDOM: {"importance": "random", "lora_rank": 0},
    "l1": {"importance": "l1", "lora_rank": 0},
    L2: {"importance": "l2", "lora_rank": 0},
    **{
        f"taylor {order} {granularity}": {
            "importance": "taylor",
            "order": order,
            "granularity": granularity,
            "lora_rank": 0,
        }
        for order, granularity in (
            ("first", "element"),
            ("second", "element"),
            ("mixed", "element"),
            ("first", "vector"),
        )
    },
    ON_TEXT: {"importance": "taylor", "lora_rank": 8, "lora_objective": "text"},
    RECOVERED: {"importance": "taylor", "lora_rank": 8},
}
SEEDS = (0, 1, 2)
SEQUENCES, LENGTH = 512, 256
EVALUATED = 117  # windows of 512 tokens
UPDATES, LEARNING_RATE = 200, 1e-3  # a model this small learns with ten times the authors' rate


def main() -> None:
    """Run every case, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: reference-7m")
    parser.add_argument("--text", type=Path, help="halved to calibrate and to evaluate; default heldout-code.txt")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--home", type=Path, help="where results are kept, and found by a later call; default: nowhere")
    parser.add_argument("--quick", action="store_true", help="few windows and updates: does everything run?")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/llm_pruner.json")
    arguments = parser.parse_args()
    model = (arguments.model or shared_data() / "models" / "reference-7m").resolve()
    text = arguments.text or shared_data() / "text" / "heldout-code.txt"
    sequences, evaluated, updates = (16, 4, 8) if arguments.quick else (SEQUENCES, EVALUATED, UPDATES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = (arguments.home or folder / "home").absolute()
        calibration_text, evaluation_text = split_text(text, folder)
        windows = folder / "evaluation.safetensors"
        make_windows(model, evaluation_text, windows, evaluated, 512, in_order=True)
        calibration = Calibration(calibration_text, sequences, LENGTH)
        dense = perplexity(model, windows)
        print(f"dense: {dense:.2f}", flush=True)
        recovery = {"lora_updates": updates, "lora_learning_rate": LEARNING_RATE}
        found = {
            case: measure(model, calibration, windows, folder, home, {**CASES[case], **recovery})
            for case in arguments.cases
        }
    show(found, dense)
    aimed = [target for case, by_criterion in found.items() for target in aims(case, by_criterion)]
    targets.show(aimed)
    if arguments.save:
        results.save(
            "llm_pruner",
            {
                **results.circumstances(),
                "quick": arguments.quick,
                "model": model.name,
                "text": text.name,
                "calibration": {"sequences": sequences, "length_tokens": LENGTH},
                "evaluation": {"windows": evaluated, "length_tokens": 512},
                "recovery": recovery,
                "dense_perplexity": dense,
                "cases": found,
                "targets": [target.record() for target in aimed],
            },
        )


def perplexity(folder: Path, windows: Path) -> float:
    """As stock Transformers has it, in a fresh process."""
    finished = run([sys.executable, "-m", "benchmarks.perplexity", folder, windows], environment())
    return float(json.loads(finished.stdout)["perplexity"])


def measure(
    model: Path, calibration: Calibration, windows: Path, folder: Path, home: Path, parameters: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Prune by every criterion; return perplexity, seconds of the step, and what the step recorded."""
    found = {}
    for criterion, chosen in CRITERIA.items():
        step = {"prune": "llm_pruner", "with": {**parameters, **chosen}}
        runs = []
        for seed in SEEDS if chosen["importance"] == "random" else SEEDS[:1]:
            result = ours.compress(model, calibration, step, folder / "spec", home, seed=seed)
            pruned = result["steps"][1]
            runs.append(
                {
                    "perplexity": perplexity(Path(pruned["artifact"]["path"]), windows),
                    "seconds": None if pruned["cached"] else pruned["seconds"] - pruned["import_seconds"],
                    "metrics": pruned["metrics"],
                }
            )
        middle = statistics.median_low(one["perplexity"] for one in runs)
        found[criterion] = {
            **next(one for one in runs if one["perplexity"] == middle),
            "perplexities": [one["perplexity"] for one in runs],
        }
        print(f"{parameters['ratio']} {criterion}: {middle:.2f}", flush=True)
    return found


def show(found: dict[str, dict[str, dict[str, Any]]], dense: float) -> None:
    """Print the table."""
    for case, by_criterion in found.items():
        first = next(iter(by_criterion.values()))["metrics"]
        share = first["parameters_after"] / first["parameters_before"]
        print(f"\n{case}: {share:.1%} of the parameters left; dense {dense:.2f}")
        print(f"{'':<28}{'perplexity':>11}{'/ dense':>9}{'seconds':>9}")
        for criterion, one in by_criterion.items():
            ratio = one["perplexity"] / dense
            seconds = "found" if one["seconds"] is None else f"{one['seconds']:.1f}"
            print(f"{criterion:<28}{one['perplexity']:>11.2f}{ratio:>9.2f}{seconds:>9}")


def aims(case: str, found: dict[str, dict[str, Any]]) -> list[Target]:
    """Every criterion better than the one before it."""
    order = [L2, RANDOM, VECTOR, ELEMENT, RECOVERED]
    return [
        Target(
            f"{case}: perplexity of {better} / of {worse}",
            1.0,
            found[better]["perplexity"] / found[worse]["perplexity"],
        )
        for worse, better in [*itertools.pairwise(order), (ON_TEXT, RECOVERED)]
    ]


if __name__ == "__main__":
    main()
