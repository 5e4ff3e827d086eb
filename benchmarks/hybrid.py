"""Prune, distill and quantize in all six orders, and each alone, at equal bytes on disk.

    python -m benchmarks.hybrid [--model quickstart|reference-7m ...] [--seeds N] [--home DIR] [--quick] [--save]

P removes decoder layers (`prune: depth`, SLEB's greedy choice), D lowers the forward KL from the dense model
(`distill: logits`; of a model on a grid, straight-through), Q is `quantize: gptq` in groups of 128. A budget is what P
and Q take together: all six orders have these bytes. Each method alone gets at most as many:

    Q    `quantize: mixed` at the budget, from 2 bits on           P    as many layers removed as it takes
    D    the student with as few layers, evenly taken, distilled   QD   Q at the budget, then D on its grid
                                                                   PD   P at the budget, then D

What does not fit at any setting is said to. Everything of a seed draws its text with that seed: calibration and
distillation. One evaluator for all: stock Transformers, float32, held-out text of the same kind: perplexity, and KL
divergence from the dense model. The table gives means over the seeds, and the extremes.

D first is distillation of the dense model from itself: there is nothing to learn, so DPQ is PQ, and DQP is QP. The
orders are run all the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import results, targets
from benchmarks.chains import Kitchen
from benchmarks.closeness import Evaluator
from benchmarks.conformance_models import MODELS, Material
from benchmarks.hybrid_plot import draw
from benchmarks.processes import RunError
from benchmarks.targets import Target
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import OrchestratorError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GROUP_SIZE = 128
ORDERS = ("PDQ", "PQD", "QPD", "QDP", "DPQ", "DQP")
CHOSEN = "PQD"
ALONE = ("Q", "P", "D", "QD", "PD")
BUDGETS = (4, 3, 2)  # bits of Q in the orders
WIDTHS = [2, 3, 4, 5, 6, 8]  # to choose from for Q alone
BATCH, WINDOWS, LENGTH, CALIBRATION = 4, 320, 256, 64
LEARNING_RATE, TOP_K = 1e-3, 64


@dataclass(frozen=True)
class Scale:
    """How much of a model goes and how long it is trained: what two cores can do in an hour.

    removed: decoder layers. updates: of D. pruned_on: windows on which P chooses.
    """

    removed: int
    updates: int
    pruned_on: int


SCALES = {"quickstart": Scale(1, 80, CALIBRATION), "reference-7m": Scale(2, 32, 16)}


@dataclass(frozen=True)
class Row:
    """One chain at one budget and seed. failed: why there is no result."""

    bytes: int = 0
    perplexity: float = 0.0
    kl: float = 0.0
    failed: str | None = None


class Chains:
    """Runs chains on one model with one seed; a prefix that was run already is found in the home."""

    def __init__(self, material: Material, scale: Scale, seed: int, folder: Path, home: Path) -> None:
        self._material, self._scale, self._seed = material, scale, seed
        self._kitchen = Kitchen(material.model, folder, home)
        self.prune = {"prune": "depth", "with": {"layers": scale.removed, "criterion": "greedy"}}
        self.distill = {
            "distill": "logits",
            "with": {
                "source": str(material.calibration.text),
                "sequences": WINDOWS,
                "length_tokens": LENGTH,
                "updates": scale.updates,
                "batch_sequences": BATCH,
                "learning_rate": LEARNING_RATE,
                "teacher_top_k": TOP_K,
            },
        }

    def quantize(self, bits: int) -> dict[str, Any]:
        """Q of the orders."""
        return {"quantize": "gptq", "with": {"num_bits": bits, "group_size": GROUP_SIZE}}

    def run(self, steps: list[dict[str, Any]]) -> Checkpoint:
        """Return the result of a chain. Raises `OrchestratorError`."""
        whole: list[dict[str, Any]] = []
        drawn = None
        for step in steps:
            windows = self._scale.pruned_on if "prune" in step else CALIBRATION
            if windows != drawn:
                whole.append(self._calibrate(windows))
            whole.append(step)
            drawn = windows
        return self._kitchen.run(whole, self._seed)[0]

    def _calibrate(self, windows: int) -> dict[str, Any]:
        source = str(self._material.calibration.text)
        return {"calibrate": "text", "with": {"source": source, "sequences": windows, "length_tokens": LENGTH}}

    def order(self, letters: str, bits: int) -> Checkpoint:
        """One of the six orders."""
        parts = {"P": self.prune, "D": self.distill, "Q": self.quantize(bits)}
        return self.run([parts[letter] for letter in letters])

    def alone(self, letters: str, budget: int) -> Checkpoint:
        """One method at no more than `budget` bytes."""
        mixed = {"quantize": "mixed", "with": {"budget": budget, "num_bits": WIDTHS, "group_size": GROUP_SIZE}}
        if letters == "Q":
            return self.run([mixed])
        if letters == "QD":
            return self.run([mixed, self.distill])
        criterion = "evenly" if letters == "D" else "greedy"
        layers = self._layers_to_remove(budget)
        shallow = {"prune": "depth", "with": {"layers": layers, "criterion": criterion}}
        return self.run([shallow] if letters == "P" else [shallow, self.distill])

    def _layers_to_remove(self, budget: int) -> int:
        """How many layers must go until the plain model fits. Raises `OrchestratorError` if one is too many."""
        model = Checkpoint(self._material.model)
        blocks = sorted(model.layers_by_block())
        of_one = sum(info.num_bytes for name, info in model.tensors.items() if name.startswith(f"{blocks[0]}."))
        layers = -(-(model.weight_bytes() - budget) // of_one)
        if layers >= len(blocks):
            raise OrchestratorError(f"even one layer of plain weights takes more than {budget:,} bytes")
        return int(layers)


def main() -> None:
    """Run, print, draw, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=list(SCALES), default=list(SCALES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--home", type=Path, help="where results are kept, and found by a later call; default: nowhere")
    parser.add_argument("--quick", action="store_true", help="few updates, one seed: does everything run?")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/hybrid.json and .svg")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    found = {}
    with tempfile.TemporaryDirectory() as name:
        home = (arguments.home or Path(name) / "home").absolute()
        home.mkdir(parents=True, exist_ok=True)
        for model in arguments.model:
            folder = (arguments.home or Path(name)).absolute() / model
            folder.mkdir(parents=True, exist_ok=True)
            scale = replace(SCALES[model], updates=2) if arguments.quick else SCALES[model]
            found[model] = compare(model, scale, seeds, folder, home)
    aimed = [target for model, facts in found.items() for target in aims(model, facts)]
    for model, facts in found.items():
        show(model, facts)
    targets.show(aimed)
    if arguments.save:
        results.save(
            "hybrid",
            {
                **results.circumstances(),
                "quick": arguments.quick,
                "seeds": seeds,
                "distillation": {
                    "windows": BATCH,
                    "length_tokens": LENGTH,
                    "learning_rate": LEARNING_RATE,
                    "teacher_top_k": TOP_K,
                },
                "calibration": {"sequences": CALIBRATION, "length_tokens": LENGTH},
                "models": found,
                "targets": [target.record() for target in aimed],
            },
        )
        draw(found, results.FOLDER / "hybrid.svg")


def compare(model: str, scale: Scale, seeds: int, folder: Path, home: Path) -> dict[str, Any]:
    """Run everything on one model; return the dense model's figures and those of each budget."""
    from safetensors.torch import load_file

    material = MODELS[model](folder, quick=False)
    evaluate = Evaluator(Checkpoint(material.model).load(), load_file(material.held_out)["tokens_NT"])
    rows: dict[int, dict[str, list[Row]]] = {bits: {} for bits in BUDGETS}
    for seed in range(seeds):
        chains = Chains(material, scale, seed, folder, home)
        for bits in BUDGETS:
            for label, row in _rows(chains, bits, evaluate):
                rows[bits].setdefault(label, []).append(row)
                said = row.failed or f"{row.bytes:,} bytes, perplexity {row.perplexity:.3f}, KL {row.kl:.4f}"
                print(f"{model}, seed {seed}, {bits} bits, {label}: {said}", flush=True)
    dense = {"bytes": Checkpoint(material.model).weight_bytes(), **evaluate.dense.record()}
    return {
        "dense": dense,
        "scale": asdict(scale),
        "budgets": {
            str(bits): {label: summary(many) for label, many in by_label.items()} for bits, by_label in rows.items()
        },
    }


def _rows(chains: Chains, bits: int, evaluate: Evaluator) -> Iterator[tuple[str, Row]]:
    budget = 0
    for letters in (*ORDERS, *ALONE):
        try:
            made = chains.order(letters, bits) if letters in ORDERS else chains.alone(letters, budget)
        except OrchestratorError as error:
            yield letters, Row(failed=error.problems[0].what)
            continue
        size = made.weight_bytes()
        if letters in ORDERS and budget not in (0, size):
            raise RunError(f"{letters} takes {size:,} bytes, the orders before it {budget:,}")
        if letters in ALONE and size > budget:
            raise RunError(f"{letters} takes {size:,} bytes, more than the {budget:,} of the orders")
        budget = size if letters in ORDERS else budget
        yield letters, Row(size, **evaluate(made.load()).record())


def summary(rows: list[Row]) -> dict[str, Any]:
    """Mean and extremes over the seeds; the first reason if one has no result."""
    failed = next((row.failed for row in rows if row.failed), None)
    if failed:
        return {"failed": failed}
    return {
        "bytes": max(row.bytes for row in rows),
        **{
            name: {
                "mean": statistics.mean(values),
                "lowest": min(values),
                "highest": max(values),
                "each": values,
            }
            for name, values in (("perplexity", [r.perplexity for r in rows]), ("kl", [r.kl for r in rows]))
        },
    }


def show(model: str, facts: dict[str, Any]) -> None:
    """Print the tables of one model, best first."""
    dense = facts["dense"]
    print(f"\n{model}: dense {dense['bytes']:,} bytes, perplexity {dense['perplexity']:.3f}")
    for bits, rows in facts["budgets"].items():
        print(f"\n{facts['scale']['removed']} layers and {bits} bits")
        print(f"{'':<6}{'bytes':>12}{'perplexity':>12}{'from':>10}{'to':>10}{'KL':>9}")
        done = {label: row for label, row in rows.items() if "failed" not in row}
        for label, row in sorted(done.items(), key=lambda item: item[1]["perplexity"]["mean"]):
            value = row["perplexity"]
            figures = (
                f"{value['mean']:>12.3f}{value['lowest']:>10.3f}{value['highest']:>10.3f}{row['kl']['mean']:>9.4f}"
            )
            print(f"{label:<6}{row['bytes']:>12,}{figures}")
        for label in rows.keys() - done.keys():
            print(f"{label:<6}{rows[label]['failed'].splitlines()[0][:100]}")


def aims(model: str, facts: dict[str, Any]) -> list[Target]:
    """The three in the order of `CHOSEN` are better than every method alone; it was fixed before anything was run."""
    aimed = []
    for bits, rows in facts["budgets"].items():
        for alone in ALONE:
            ratio = None
            if "failed" not in rows[alone] and "failed" not in rows[CHOSEN]:
                ratio = rows[CHOSEN]["perplexity"]["mean"] / rows[alone]["perplexity"]["mean"]
            aimed.append(Target(f"{model}, {bits} bits: perplexity of {CHOSEN} / {alone}", 1.0, ratio))
    return aimed


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
