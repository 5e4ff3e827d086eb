"""Perplexity without one and two decoder layers: block influence, the greedy choice, and all choices there are.

    python -m benchmarks.depth [--model DIR] [--text FILE] [--sequences N] [--windows N] [--singles] [--save]

Each criterion chooses on the first half of the text, by `orchestrator run`; all are evaluated on the second, by stock
Transformers. Beside them stand the mean and the best of all sets of layers that could have been removed: what a
random choice gives, and what nobody can beat. These are evaluated here, on a Llama whose layers are left out by hand.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks import ours, results, targets
from benchmarks.material import shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.processes import RunError
from benchmarks.systems import make_windows, perplexity
from benchmarks.targets import Target

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CRITERIA = ("block_influence", "greedy")
REMOVED = (1, 2)
SEQUENCES, WINDOWS, LENGTH = 64, 64, 512
BATCH = 4


def main() -> None:
    """Choose, evaluate, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a Llama; default reference-7m")
    parser.add_argument("--text", type=Path, help="default heldout-code.txt; half to choose on, half to evaluate on")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="windows to choose on")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows to evaluate on")
    parser.add_argument("--singles", action="store_true", help="evaluate every layer's removal, but not every pair's")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/depth.json")
    arguments = parser.parse_args()
    model = (arguments.model or shared_data() / "models" / "reference-7m").resolve()
    text = arguments.text or shared_data() / "text" / "heldout-code.txt"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen_on, evaluated_on = split_text(text, folder)
        windows = folder / "windows.safetensors"
        make_windows(model, evaluated_on, windows, arguments.windows, LENGTH, in_order=True)
        dense = perplexity(model, windows)
        print(f"dense: {dense:.3f}", flush=True)
        chosen = {
            f"{criterion}, {count} removed": choose(
                model, Calibration(chosen_on, arguments.sequences, LENGTH), criterion, count, folder, windows
            )
            for count in REMOVED
            for criterion in CRITERIA
        }
        counts = REMOVED[:1] if arguments.singles else REMOVED
        everything = {count: dict(every_removal(model, windows, count)) for count in counts}
    show(dense, chosen, everything)
    aimed = aims(chosen, everything)
    targets.show(aimed)
    if arguments.save:
        results.save(
            "depth",
            {
                **results.circumstances(),
                "model": model.name,
                "text": text.name,
                "calibration": {"sequences": arguments.sequences, "length_tokens": LENGTH},
                "windows": {"sequences": arguments.windows, "length_tokens": LENGTH},
                "dense": dense,
                "chosen": chosen,
                "all": {count: summary(found) for count, found in everything.items()},
                "single": {str(gone[0]): value for gone, value in everything[1].items()},
                "targets": [target.record() for target in aimed],
            },
        )


def choose(
    model: Path, calibration: Calibration, criterion: str, count: int, folder: Path, windows: Path
) -> dict[str, Any]:
    """Remove layers by our command; return which, what it took, and the perplexity of what is left."""
    step = {"prune": "depth", "with": {"layers": count, "criterion": criterion}}
    done = ours.compress(model, calibration, step, folder / "spec", folder / "home")["steps"][1]
    metrics = done["metrics"]
    found = {
        "layers": [int(metrics[f"removed_layer_{turn}"]) for turn in range(1, count + 1)],
        "perplexity": perplexity(Path(done["artifact"]["path"]), windows),
        "chosen_on_before": math.exp(metrics["loss_before"]),
        "chosen_on_after": math.exp(metrics["loss_after"]),
        "seconds": done["seconds"] - done["import_seconds"],
        "peak_bytes": done["peak_memory_bytes"],
        "scores": {key: value for key, value in metrics.items() if key.startswith(("block_influence", "loss_without"))},
    }
    print(f"{criterion}, {count} removed: layers {found['layers']}, {found['perplexity']:.3f}", flush=True)
    return found


def every_removal(folder: Path, windows: Path, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every set of `count` layers with the perplexity without them. Knows Llama only, and nothing of ours."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    tokens_NT = load_file(windows)["tokens_NT"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = list(model.model.layers)
    for gone in combinations(range(len(layers)), count):
        left = [layer for index, layer in enumerate(layers) if index not in gone]
        model.model.layers = torch.nn.ModuleList(left)
        model.config.num_hidden_layers = len(left)
        total = 0.0
        with torch.no_grad():
            for tokens_BT in tokens_NT.split(BATCH):
                logits = model(tokens_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
                total += cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="sum").item()
        yield gone, math.exp(total / tokens_NT[:, 1:].numel())


def summary(found: dict[tuple[int, ...], float]) -> dict[str, Any]:
    """What a random choice gives, and the best and the worst of all."""
    best, worst = min(found, key=lambda gone: found[gone]), max(found, key=lambda gone: found[gone])
    return {
        "sets": len(found),
        "mean": statistics.mean(found.values()),
        "median": statistics.median(found.values()),
        "best": {"layers": best, "perplexity": found[best]},
        "worst": {"layers": worst, "perplexity": found[worst]},
    }


def show(dense: float, chosen: dict[str, Any], everything: dict[int, dict[tuple[int, ...], float]]) -> None:
    """Print one line for each."""
    print(f"\n{'':<32}{'layers':>12}{'perplexity':>12}{'/ dense':>9}{'seconds':>9}")
    print(f"{'dense':<32}{'':>12}{dense:>12.2f}{1:>9.2f}")
    for name, one in chosen.items():
        gone = " ".join(map(str, one["layers"]))
        print(f"{name:<32}{gone:>12}{one['perplexity']:>12.2f}{one['perplexity'] / dense:>9.2f}{one['seconds']:>9.1f}")
    for count, found in everything.items():
        facts = summary(found)
        for what in ("mean", "median"):
            label = f"{what} of all {facts['sets']}, {count} removed"
            print(f"{label:<32}{'':>12}{facts[what]:>12.2f}{facts[what] / dense:>9.2f}")
        for what in ("best", "worst"):
            gone, value = " ".join(map(str, facts[what]["layers"])), facts[what]["perplexity"]
            print(f"{f'{what} of them':<32}{gone:>12}{value:>12.2f}{value / dense:>9.2f}")


def aims(chosen: dict[str, Any], everything: dict[int, dict[tuple[int, ...], float]]) -> list[Target]:
    """Greedy at least as good as block influence, and that better than chance."""
    aimed = []
    for count, found in everything.items():
        influence, greedy = (chosen[f"{name}, {count} removed"]["perplexity"] for name in CRITERIA)
        mean = summary(found)["mean"]
        aimed.append(Target(f"perplexity of greedy / block influence, {count} removed", 1.0, greedy / influence))
        aimed.append(Target(f"perplexity of block influence / mean of all, {count} removed", 1.0, influence / mean))
    return aimed


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
