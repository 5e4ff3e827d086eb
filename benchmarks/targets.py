"""The table that ends each benchmark: what was aimed at, what came out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """`measured` is to be at most `limit`; None if it could not be measured."""

    what: str
    limit: float
    measured: float | None

    @property
    def verdict(self) -> str:
        """In one word."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.limit else "MISSED"

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**asdict(self), "verdict": self.verdict}


def show(targets: Iterable[Target]) -> None:
    """Print the table."""
    print(f"\n{'target':<72}{'at most':>9}{'measured':>10}")
    for target in targets:
        measured = "-" if target.measured is None else f"{target.measured:.3f}"
        print(f"{target.what:<72}{target.limit:>9.3f}{measured:>10}  {target.verdict}")
