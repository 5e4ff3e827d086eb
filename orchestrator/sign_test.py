"""What is right or wrong, unit by unit, before and after: the exact test of whether it has become worse.

Only units that the two models answer differently say anything. If neither model is better, each of those is lost or won
like a coin falls (McNemar 1947, "Note on the Sampling Error of the Difference between Correlated Proportions or
Percentages", Psychometrika 12). Their number is small where compression is good, so the probability is the binomial's
and not an approximation: the sign test (Dixon and Mood 1946, "The Statistical Sign Test", JASA 41). The bootstrap of
`orchestrator.bootstrap` refuses too often there: of 3 lost units and none won, every resample has lost at most some.

The interval of the difference is that of Clopper and Pearson (1934, Biometrika 26) for the share of the won among those
units, so it holds 0 exactly when the test finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """How many units have become right (`won`) and wrong (`lost`), of so many."""

    won: int
    lost: int
    units: int

    def chance(self, worse: int) -> float:
        """How likely so many units or more are worse, if neither model is better. worse: `lost`, or `won` of what there
        should be little of."""
        return at_least(worse, self.won + self.lost, 0.5)

    def interval(self, confidence: float) -> tuple[float, float]:
        """The ends of the interval of the difference of the shares, -1 to 1."""
        changed, tail = self.won + self.lost, (1 - confidence) / 2
        if not changed:
            return 0.0, 0.0
        low = _solve(lambda share: at_least(self.won, changed, share) - tail) if self.won else 0.0
        high = _solve(lambda share: tail - at_least(self.lost, changed, 1 - share)) if self.lost else 1.0
        return (2 * low - 1) * changed / self.units, (2 * high - 1) * changed / self.units


def fewest_noticed(confidence: float) -> int:
    """How many units must be lost, where none is won, for the test to notice it."""
    return math.ceil(-math.log2((1 - confidence) / 2))


def at_least(count: int, of: int, share: float) -> float:
    """The binomial probability of `count` or more."""
    import numpy as np

    if count <= 0:
        return 1.0
    places = np.arange(of + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((of - places[:-1]) / (places[:-1] + 1)))])
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = ways + places * np.log(share) + (of - places) * np.log1p(-share)
    return float(np.exp(terms[count:]).sum())


def _solve(rising: Callable[[float], float]) -> float:
    """Where a rising function of a share is 0."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
