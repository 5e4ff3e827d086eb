"""What is compared. Imports nothing, so that the runners in the peers' environments can read it too."""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZE = 128
BLOCK_SIZE = 128
DAMPING = 0.01


@dataclass(frozen=True)
class Case:
    """One way to compress: GPTQ to `num_bits` (symmetric, groups of 128), or Wanda to half with an n:m `pattern`."""

    method: str
    num_bits: int = 0
    pattern: tuple[int, int] | None = None


CASES = {
    "W4g128": Case("gptq", num_bits=4),
    "W3g128": Case("gptq", num_bits=3),
    "Wanda 50 %": Case("wanda"),
    "Wanda 2:4": Case("wanda", pattern=(2, 4)),
}
