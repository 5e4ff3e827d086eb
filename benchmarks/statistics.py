"""The dominant cost of calibration, X^T X of every input of a block: one product for every layer, or for every input.

    python -m benchmarks.statistics [--repeats 5] [--quick] [--save]

Others sum one full H = X^T X for each linear layer, although q, k and v read one input, and gate and up another, and
although H is symmetric. Here it is one lower triangle for each distinct input. In float32; the lower triangle must be
the full product's bit for bit. "add_batch" is the authors' own loop, which also rescales H and X with every sample;
the ratio is to the plain full products, which are faster.

Shape legend: T = tokens of a sample, I = in features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import results, targets
from benchmarks.processes import THREADS
from benchmarks.targets import Target

if TYPE_CHECKING:
    import torch

RATIO_LIMIT = 0.6
STRIP = 128


@dataclass(frozen=True)
class Block:
    """inputs: in features of each distinct input of a block. readers: how many layers read it."""

    inputs: tuple[int, ...]
    readers: tuple[int, ...]


def llama(hidden: int, intermediate: int) -> Block:
    """q/k/v, o, gate/up, down."""
    return Block((hidden, hidden, hidden, intermediate), (3, 1, 2, 1))


def opt(hidden: int, intermediate: int) -> Block:
    """q/k/v, out, fc1, fc2."""
    return Block((hidden, hidden, hidden, intermediate), (3, 1, 1, 1))


SHAPES = {
    "TinyLlama-1.1B": llama(2048, 5632),
    "OPT-125M": opt(768, 3072),
    "reference-7m": llama(256, 768),
}


def our_accumulate() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return what the core accumulates with, or the same arithmetic where the core does not have it yet."""
    try:
        from orchestrator.statistics import accumulate_lower
    except ImportError:
        return accumulate_by_strips
    return accumulate_lower


def accumulate_by_strips(hessian_II: torch.Tensor, x_TI: torch.Tensor) -> None:
    """Add X^T X to the lower triangle of H, and to some entries above it."""
    for start in range(0, len(hessian_II), STRIP):
        end = min(start + STRIP, len(hessian_II))
        hessian_II[start:end, :end].addmm_(x_TI[:, start:end].T, x_TI[:, :end])


def measure(block: Block, tokens: int, repeats: int) -> dict[str, Any]:
    """Return the median seconds of each way for one block and one sample, and whether the triangles are identical."""
    import torch

    from benchmarks.peers.reference import HessianSum

    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(tokens, width, generator=generator) for width in block.inputs]
    accumulate = our_accumulate()
    # One for each layer in the others' programs, one for each distinct input in ours.
    full = [
        [torch.zeros(x_TI.shape[1], x_TI.shape[1]) for _ in range(readers)]
        for x_TI, readers in zip(samples, block.readers, strict=True)
    ]
    lower = [torch.zeros_like(hessians[0]) for hessians in full]
    authors = [
        [HessianSum(torch.nn.Linear(x_TI.shape[1], 1)) for _ in range(readers)]
        for x_TI, readers in zip(samples, block.readers, strict=True)
    ]

    def ours() -> None:
        for hessian_II, x_TI in zip(lower, samples, strict=True):
            accumulate(hessian_II, x_TI)

    def products() -> None:
        for hessians, x_TI in zip(full, samples, strict=True):
            for hessian_II in hessians:
                hessian_II.addmm_(x_TI.T, x_TI)

    def add_batch() -> None:
        for sums, x_TI in zip(authors, samples, strict=True):
            for hessian_sum in sums:
                hessian_sum.add_batch(x_TI[None])

    seconds: dict[str, list[float]] = {"ours": [], "full products": [], "add_batch": []}
    for repeat in range(repeats + 1):
        for label, way in zip(seconds, (ours, products, add_batch), strict=True):
            taken = _seconds(way)
            if repeat:  # the first one pays for pages that are touched for the first time
                seconds[label].append(taken)
    identical = all(torch.equal(a.tril(), b[0].tril()) for a, b in zip(lower, full, strict=True))
    medians = {label: statistics.median(taken) for label, taken in seconds.items()}
    return {"seconds": medians, "identical": identical, "ratio": medians["ours"] / medians["full products"]}


def _seconds(way: Callable[[], None]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def show(measured: dict[str, dict[str, Any]], tokens: int) -> None:
    """Print the table."""
    print(f"milliseconds for one block and one sample of {tokens} tokens, medians\n")
    print(f"{'':<18}{'ours':>10}{'products':>10}{'add_batch':>11}{'ours / products':>17}  lower triangle")
    for name, result in measured.items():
        times = [1000 * value for value in result["seconds"].values()]
        same = "identical" if result["identical"] else "DIFFERS"
        print(f"{name:<18}{times[0]:>10.1f}{times[1]:>10.1f}{times[2]:>11.1f}{result['ratio']:>17.3f}  {same}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save if asked to."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="of a sample")
    parser.add_argument("--quick", action="store_true", help="short samples, two repeats")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/statistics.json")
    options = parser.parse_args(arguments)
    tokens, repeats = (512, 2) if options.quick else (options.tokens, options.repeats)
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    measured = {name: measure(block, tokens, repeats) for name, block in SHAPES.items()}
    show(measured, tokens)
    aimed = [Target(f"{name}: ours / full products", RATIO_LIMIT, result["ratio"]) for name, result in measured.items()]
    differing = sum(not result["identical"] for result in measured.values())
    aimed.append(Target("shapes whose lower triangle differs from the full product's", 0, differing))
    targets.show(aimed)
    if options.save:
        results.save(
            "statistics",
            {
                **results.circumstances(),
                "tokens": tokens,
                "repeats": repeats,
                "shapes": measured,
                "targets": [target.record() for target in aimed],
            },
        )


if __name__ == "__main__":
    main()
