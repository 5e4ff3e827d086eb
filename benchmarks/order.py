"""Whether the order known from the literature comes out of `benchmarks.conformance`.

Quantization: at 3 bits and groups of 64 to 128, rounding to nearest loses at least as much as AWQ and as GPTQ
(arXiv:2306.00978, tables 4 and 5; arXiv:2210.17323, table 6). LLM-Pruner (arXiv:2305.11627, table 1, LLaMA-7B without
recovery, a fifth of the parameters): perplexity on WikiText-2 is 582 by least L2 norm, 27.5 at random, 22.3 by Taylor
expansion of vectors, 19.1 of elements. Of random choices, the mean of all seeds counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

L2, RANDOM, VECTOR, ELEMENT = (f"llm_pruner {name}" for name in ("l2", "random", "first vector", "first element"))
# What loses more, what loses less.
PAIRS = [
    *(
        (f"rtn {setting}", f"{better} {setting}")
        for setting in ("W3 g64", "W3 g128", "W3 g128 asym")
        for better in ("gptq", "awq")
    ),
    (RANDOM, VECTOR),
    (RANDOM, ELEMENT),
    (L2, VECTOR),
    (L2, ELEMENT),
    (VECTOR, ELEMENT),
    (L2, RANDOM),
]


@dataclass(frozen=True)
class Line:
    """KL and perplexity of both, by one side: "ours" or "reference"."""

    worse: str
    better: str
    side: str
    kl: tuple[float, float]
    perplexity: tuple[float, float]

    @property
    def verdict(self) -> str:
        """In words."""
        holds = [first >= second for first, second in (self.kl, self.perplexity)]
        return "as the literature" if all(holds) else "NOT" if not any(holds) else "NOT by one of the two"

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**asdict(self), "verdict": self.verdict}


def found(rows: Mapping[str, Any]) -> list[Line]:
    """Return a line for each pair and side of which both are there. rows: those of `benchmarks.conformance`."""
    lines = []
    for side in ("ours", "reference"):
        for pair in PAIRS:
            both = [_numbers(rows, name, side) for name in pair]
            if both[0] and both[1]:
                kl, perplexity = zip(both[0], both[1], strict=True)
                lines.append(Line(*pair, side, kl, perplexity))
    return lines


def _numbers(rows: Mapping[str, Any], name: str, side: str) -> tuple[float, float] | None:
    of_name = [row for case, row in rows.items() if case == name or (name == RANDOM and case.startswith(RANDOM))]
    those = [getattr(row, side) for row in of_name]
    if not those or None in those:
        return None
    return statistics.mean(one.kl for one in those), statistics.mean(one.perplexity for one in those)


def show(lines: list[Line]) -> None:
    """Print them."""
    if lines:
        print(f"\n{'order':<11}{'loses more':<24}{'loses less':<28}{'KL':>10}{'':>10}{'perplexity':>12}{'':>10}")
    for one in lines:
        cells = f"{one.side:<11}{one.worse:<24}{one.better:<28}{one.kl[0]:>10.5f}{one.kl[1]:>10.5f}"
        print(f"{cells}{one.perplexity[0]:>12.3f}{one.perplexity[1]:>10.3f}  {one.verdict}")
