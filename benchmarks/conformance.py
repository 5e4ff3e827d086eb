"""Every method beside an independent reference: the paper's algorithm, written plainly in float64.

    python -m benchmarks.conformance [--model NAME ...] [--cases GLOB] [--home DIR] [--noise N] [--quick] [--save]

Each case is compressed by this project's command line and by `benchmarks.reference`, on the same calibration windows,
and both results are evaluated by the same code on the same held-out windows, in float32: perplexity, and KL divergence
from the dense model. Where the two KLs differ by more than a thousandth, the reference is repeated in float32 with
other roundings, `--noise` times: a weight or scale close to the middle between two numbers that it can be rounded to
then goes the other way, and what follows goes with it. A method that is not installed is shown without ours. Behind the
table: whether the order that is known from the literature comes out (`benchmarks.order`).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import order, ours, results
from benchmarks.closeness import Closeness, Evaluator
from benchmarks.conformance_models import MODELS, Material
from benchmarks.processes import RunError, environment, run
from benchmarks.reference import awq, depth, fp8, gptq, hqq, llm_pruner, rtn, smoothquant, sparsegpt, wanda
from benchmarks.reference.model import load


@dataclass(frozen=True)
class Case:
    """stage, method, parameters: of this project's step. reference, options: the same of the reference; None: none.

    group: neighbouring inputs with one scale, of methods that have groups. seed: of the specification.
    """

    stage: str
    method: str
    parameters: Mapping[str, Any]
    reference: Callable[..., None] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    group: int | None = None
    seed: int = 0


def grid(method: str, reference: Any, num_bits: int, group: int, *, symmetric: bool = True) -> Case:
    """Integer weights in groups."""
    both = {"num_bits": num_bits, "symmetric": symmetric}
    return Case("quantize", method, both, reference.compress, both, group)


def zeros(method: str, reference: Callable[..., None]) -> dict[str, Case]:
    """Half of the weights, and 2:4."""
    return {
        f"{method} 50 %": Case("prune", method, {}, reference),
        f"{method} 2:4": Case("prune", method, {"pattern": "2:4"}, reference, {"pattern": "2:4"}),
    }


def channels(reference: Callable[..., None] | None, seed: int = 0, **options: str) -> Case:
    """A fifth of the MLP channels."""
    order_of = options.get("order", "random")
    chosen = {"importance": order_of} if order_of in ("random", "l2") else {"importance": "taylor", **options}
    parameters = {"ratio": 0.2, "attention": False, "lora_rank": 0, **chosen}
    return Case("prune", "llm_pruner", parameters, reference, options, seed=seed)


CASES: dict[str, Case] = {
    "rtn W4 g128": grid("rtn", rtn, 4, 128),
    "rtn W3 g128": grid("rtn", rtn, 3, 128),
    "rtn W3 g64": grid("rtn", rtn, 3, 64),
    "rtn W3 g128 asym": grid("rtn", rtn, 3, 128, symmetric=False),
    "hqq W4 g128 asym": grid("hqq", hqq, 4, 128, symmetric=False),
    "hqq W3 g64 asym": grid("hqq", hqq, 3, 64, symmetric=False),
    "gptq W4 g128": grid("gptq", gptq, 4, 128),
    "gptq W3 g128": grid("gptq", gptq, 3, 128),
    "gptq W3 g64": grid("gptq", gptq, 3, 64),
    "gptq W3 g128 asym": grid("gptq", gptq, 3, 128, symmetric=False),
    "gptq W2 g64": grid("gptq", gptq, 2, 64),
    "awq W4 g128 asym": grid("awq", awq, 4, 128, symmetric=False),
    "awq W3 g128 asym": grid("awq", awq, 3, 128, symmetric=False),
    "awq W3 g128": grid("awq", awq, 3, 128),
    "awq W3 g64": grid("awq", awq, 3, 64),
    "smoothquant W8A8 dynamic": Case("quantize", "smoothquant", {"activations": "dynamic"}, smoothquant.compress),
    "smoothquant W8A8 static": Case(
        "quantize", "smoothquant", {"activations": "static"}, smoothquant.compress, {"static": True}
    ),
    "fp8": Case("quantize", "fp8", {}, fp8.compress),
    **zeros("magnitude", wanda.compress_by_magnitude),
    **zeros("wanda", wanda.compress),
    **zeros("sparsegpt", sparsegpt.compress),
    "sparse_gptq W4 g128 50 %": Case(
        "quantize", "sparse_gptq", {"num_bits": 4}, sparsegpt.compress, {"num_bits": 4}, 128
    ),
    "sparse_gptq W4 g128 2:4": Case(
        "quantize",
        "sparse_gptq",
        {"num_bits": 4, "pattern": "2:4"},
        sparsegpt.compress,
        {"num_bits": 4, "pattern": "2:4"},
        128,
    ),
    "depth 2 by influence": Case(
        "prune",
        "depth",
        {"layers": 2, "criterion": "block_influence"},
        depth.compress,
        {"layers": 2, "greedy": False},
    ),
    "depth 2 greedily": Case(
        "prune", "depth", {"layers": 2, "criterion": "greedy"}, depth.compress, {"layers": 2, "greedy": True}
    ),
    "llm_pruner l2": channels(llm_pruner.compress, order="l2"),
    **{
        f"llm_pruner {order_of} {granularity}": channels(llm_pruner.compress, order=order_of, granularity=granularity)
        for order_of, granularity in (
            ("first", "element"),
            ("second", "element"),
            ("mixed", "element"),
            ("first", "vector"),
        )
    },
    # Nothing to conform to; for the order.
    **{f"llm_pruner random {seed}": channels(None, seed) for seed in range(5)},
}

SAME = 1e-3  # of KL: what counts as the same without looking for the noise


@dataclass(frozen=True)
class Row:
    """One case on one model. group: as it was used. dense_layers: layers that groups do not fill, left dense."""

    case: str
    group: int | None
    dense_layers: tuple[str, ...]
    reference: Closeness | None
    ours: Closeness | None
    failed: str | None = None
    noisy: tuple[Closeness, ...] = ()

    @property
    def within_noise(self) -> bool | None:
        """Whether ours lies no farther from the reference than twice what rounding to float32 moves it; None: unknown.

        By KL, on the scale of its logarithm; a thousandth is always within.
        """
        if self.ours is None or self.reference is None:
            return None
        distance = abs(math.log(self.ours.kl / self.reference.kl))
        moved = [abs(math.log(one.kl / self.reference.kl)) for one in self.noisy]
        return distance <= max([SAME, *(2 * one for one in moved)])

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """Read what `record` gives."""
        sides = [Closeness(**record[side]) if side in record else None for side in ("reference", "ours")]
        noisy = tuple(Closeness(**one) for one in record.get("noisy", ()))
        layers = tuple(record.get("dense_layers", ()))
        return cls(record["case"], record.get("group"), layers, *sides, record.get("failed"), noisy)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        found = {
            "case": self.case,
            "group": self.group,
            "dense_layers": list(self.dense_layers),
            "reference": self.reference and self.reference.record(),
            "ours": self.ours and self.ours.record(),
            "failed": self.failed,
            "noisy": [one.record() for one in self.noisy],
        }
        if self.ours and self.reference:
            found["perplexity_ratio"] = self.ours.perplexity / self.reference.perplexity
            found["kl_ratio"] = self.ours.kl / self.reference.kl
            found["within_noise"] = self.within_noise
        return {key: value for key, value in found.items() if key == "group" or value not in (None, [])}


def main() -> None:
    """Compare, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cases", default="*", help="those that fit a pattern, such as 'gptq*'")
    parser.add_argument("--home", type=Path, help="where ours are kept, and found by a later call; default: nowhere")
    parser.add_argument("--noise", type=int, default=2, metavar="N", help="see above; 0: none")
    parser.add_argument("--quick", action="store_true", help="few and short windows: does everything run?")
    parser.add_argument(
        "--save", action="store_true", help="write these models into benchmarks/results/conformance.json"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    cases = {name: case for name, case in CASES.items() if fnmatch(name, arguments.cases)}
    for name in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            material = MODELS[name](Path(folder), quick=arguments.quick)
            home = (arguments.home or Path(folder) / "home").absolute()
            rows, dense = compare(material, cases, Path(folder), home, arguments.noise)
        show(name, rows, dense)
        lines = order.found({row.case: row for row in rows})
        order.show(lines)
        if arguments.save:
            save(name, material, rows, dense, quick=arguments.quick)


def compare(
    material: Material, cases: Mapping[str, Case], folder: Path, home: Path, noise: int
) -> tuple[list[Row], Closeness]:
    """Run the cases on one model; return a row for each, and the dense model's numbers."""
    calibration_NT = load_file(material.windows)["tokens_NT"]
    evaluator = Evaluator(load(material.model), load_file(material.held_out)["tokens_NT"])
    installed = methods()
    rows = []
    for name, case in cases.items():
        row = compare_one(name, case, material, calibration_NT, evaluator, folder, home, installed, noise)
        rows.append(row)
        print(line(row), flush=True)
    return rows, evaluator.dense


def compare_one(
    name: str,
    case: Case,
    material: Material,
    calibration_NT: torch.Tensor,
    evaluator: Evaluator,
    folder: Path,
    home: Path,
    installed: set[str],
    noise: int = 0,
) -> Row:
    """Compress by the reference and by this project, and evaluate both."""
    model = load(material.model)
    group, skip = fitting(case, model)
    reference = mine = failed = None

    def refer(model: Any) -> Closeness:
        grouped = {"group": group, "skip": skip} if case.group else {}
        assert case.reference is not None
        case.reference(model, calibration_NT, **case.options, **grouped)
        return evaluator(model)

    if case.reference is not None:
        reference = refer(model)
    if case.method not in installed:
        return Row(name, group, skip, reference, None, "not installed")
    try:
        grouped = {"group_size": group} if case.group else {}
        step = {
            case.stage: case.method,
            "with": {**case.parameters, **grouped},
            **({"skip": list(skip)} if skip else {}),
        }
        result = ours.compress(material.model, material.calibration, step, folder / "spec", home, seed=case.seed)
        if case.seed == 0:  # which decides the windows too
            ours.check_windows(result, material.windows)
        checkpoint = result["steps"][1]["artifact"]["path"]
        mine = evaluator(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    except RunError as error:
        failed = str(error)
    row = Row(name, group, skip, reference, mine, failed)
    if row.within_noise is False:
        row = replace(
            row, noisy=tuple(refer(blurred(load(material.model, torch.float32), seed)) for seed in range(noise))
        )
    return row


def blurred(model: Any, seed: int) -> Any:
    """Put an error of a few roundings to float32 into the embeddings of a model, and return it."""
    weight_VD = model.model.embed_tokens.weight.data
    generator = torch.Generator().manual_seed(seed)
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)  # the head may share it
    error_VD = torch.rand(weight_VD.shape, generator=generator, dtype=torch.float64) * 2 - 1
    model.model.embed_tokens.weight.data = (weight_VD * (1 + 2**-20 * error_VD)).to(weight_VD)
    return model


def fitting(case: Case, model: Any) -> tuple[int | None, tuple[str, ...]]:
    """Return the group size that a model's layers take, and the layers it does not fill, which stay dense.

    One scale per row where it fills none.
    """
    if case.group is None:
        return None, ()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    names = {
        name: layer.in_features
        for part in (attention, mlp)
        for name, layer in part.named_children()
        if hasattr(layer, "in_features")
    }
    unfilled = tuple(name for name, width in names.items() if width % case.group)
    return (None, ()) if len(unfilled) == len(names) else (case.group, unfilled)


def methods() -> set[str]:
    """Return the names of the methods that are installed."""
    listed = json.loads(run([sys.executable, "-m", "orchestrator", "methods", "--json"], environment()).stdout)
    return {method["name"] for method in listed["methods"]}


def line(row: Row) -> str:
    """One row of the table."""
    scale = f"per row instead of g{CASES[row.case].group}" if row.group is None and CASES[row.case].group else ""
    label = (
        row.case
        + (f" ({scale})" if scale else "")
        + (f" ({', '.join(row.dense_layers)} dense)" if row.dense_layers else "")
    )
    cells = f"{label:<52}"
    for one in (row.reference, row.ours):
        cells += f"{one.perplexity:>11.4f}" if one else f"{'-':>11}"
    record = row.record()
    cells += f"{record['perplexity_ratio'] - 1:>+10.3%}" if "perplexity_ratio" in record else f"{'-':>10}"
    for one in (row.reference, row.ours):
        cells += f"{one.kl:>11.6f}" if one else f"{'-':>11}"
    cells += f"{record['kl_ratio'] - 1:>+10.3%}" if "kl_ratio" in record else f"{'-':>10}"
    verdict = {True: "", False: "  MORE THAN NOISE", None: ""}[row.within_noise]
    if row.noisy:
        moved = " ".join(f"{one.kl / row.reference.kl - 1:+.2%}" for one in row.noisy if row.reference)
        verdict += f"  in float32 the reference's KL is off by {moved}"
    return cells + verdict + (f"  {row.failed}" if row.failed else "")


def show(name: str, rows: list[Row], dense: Closeness) -> None:
    """Print the table."""
    print(f"\n{name}: perplexity of the dense model {dense.perplexity:.4f}; KL is from it, nats")
    print(f"{'':<52}{'perplexity':>11}{'':>11}{'':>10}{'KL':>11}")
    print(f"{'':<52}" + f"{'reference':>11}{'ours':>11}{'ours/ref':>10}" * 2)
    for row in rows:
        print(line(row))


def save(name: str, material: Material, rows: list[Row], dense: Closeness, *, quick: bool) -> None:
    """Put these rows into `results/conformance.json`, beside other rows found with the same versions and windows."""
    path = results.FOLDER / "conformance.json"
    there = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    now = results.circumstances()
    fixed = {"versions": now["versions"], "quick": quick, **material.record(), "dense": dense.record()}
    before = there.get(name, {})
    kept = before["rows"] if all(before.get(key) == value for key, value in fixed.items()) else []
    found = {row["case"]: row for row in [*kept, *(row.record() for row in rows)]}
    inside = {case: Row.of(found[case]) for case in CASES if case in found}
    there[name] = {
        **now,
        **fixed,
        "rows": [row.record() for row in inside.values()],
        "order": [line.record() for line in order.found(inside)],
    }
    results.save("conformance", {"models": there})


if __name__ == "__main__":
    main()
