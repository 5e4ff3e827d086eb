"""What is compared. Imports nothing, so that the runners in the peers' environments can read it too."""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZE = 128
BLOCK_SIZE = 128
DAMPING = 0.01


@dataclass(frozen=True)
class Case:
    """One way to compress: GPTQ or AWQ to `num_bits`, in groups of 128; Wanda or SparseGPT to half, or by `pattern`."""

    method: str
    num_bits: int = 0
    pattern: tuple[int, int] | None = None
    symmetric: bool = True


CASES = {
    "W4g128": Case("gptq", num_bits=4),
    "W3g128": Case("gptq", num_bits=3),
    "Wanda 50 %": Case("wanda"),
    "Wanda 2:4": Case("wanda", pattern=(2, 4)),
    "AWQ W4g128": Case("awq", num_bits=4, symmetric=False),
    "AWQ W3g128": Case("awq", num_bits=3, symmetric=False),
    "SparseGPT 50 %": Case("sparsegpt"),
    "SparseGPT 2:4": Case("sparsegpt", pattern=(2, 4)),
}

# What the walk itself is measured with.
WALK = ["W4g128", "W3g128", "Wanda 50 %", "Wanda 2:4"]
