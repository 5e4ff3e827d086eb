"""Mixed precision: give every layer the number of bits with which a budget of bytes costs the least.

What b bits cost in a layer is estimated from statistics alone: the error that quantizing leaves in its outputs,
tr(D H D^T) / n with H = X^T X (the objective of GPTQ, arXiv:2210.17323, eq. 1), times half the mean squared gradient
by those outputs, as `orchestrator.sensitivity` says: nats of KL divergence per token. The sum over layers is minimized
(as in HAWQ-V2, arXiv:1911.03852, eq. 6, where the mean eigenvalue of a Hessian stands for gradients and inputs),
exactly, by `knapsack`; so no uniform assignment of the same bytes has a smaller sum. The sum is an estimate: it leaves
out what layers do to each other, and holds for text like that of the calibration. Where it is far off (2 bits, `rtn`,
other text), a uniform assignment can turn out to be the better one. Layers that engines fuse (q/k/v, gate/up) get the
same bits.

Costs are measured once, on the inputs of the uncompressed model, and kept: another budget is only solved again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from orchestrator.api import Invariant, LayerCosts, LayerMethod, MixedMethod, QuantScheme, Stage
from orchestrator_quantization.gptq import GPTQ
from orchestrator_quantization.rtn import RTN
from orchestrator_quantization.weight_only import GroupSize, StoredScales


class Mixed(StoredScales, MixedMethod):
    """Choose the bits of every layer within a budget, then quantize it."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "mixed"
    paper: ClassVar[str] = "arXiv:1911.03852, eq. 6, with the loss of arXiv:2210.17323, eq. 1"
    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS})

    budget: ByteSize | None = Field(
        None, description="Bytes that the weight files may take in all, as 4000000000 or '3.7GiB'."
    )
    bits_per_weight: float | None = Field(
        None, gt=0, le=16, description="Instead: mean bits of the compressed weights, scales included."
    )
    num_bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(
        (2, 3, 4, 5, 6, 8), min_length=2, description="Widths to choose from, bits."
    )
    group_size: GroupSize = Field(
        128, description="Neighbouring input features that share a scale; null or -1: one scale per output channel."
    )
    rounding: Literal["gptq", "rtn"] = Field("gptq", description="How layers are quantized with the bits they get.")

    @field_validator("num_bits")
    @classmethod
    def _each_once(cls, num_bits: tuple[int, ...]) -> tuple[int, ...]:
        """One spelling gives one fingerprint."""
        if len(set(num_bits)) != len(num_bits):
            raise ValueError("give every width once")
        return tuple(sorted(num_bits))

    @model_validator(mode="after")
    def _one_budget(self) -> Mixed:
        if (self.budget is None) == (self.bits_per_weight is None):
            raise ValueError("give either budget or bits_per_weight")
        return self

    def options(self) -> tuple[LayerMethod, ...]:
        """One method for each width, in rising order."""
        method: Any = GPTQ if self.rounding == "gptq" else RTN
        return tuple(
            method(num_bits=bits, group_size=self.group_size, scale_dtype=self.scale_dtype) for bits in self.num_bits
        )

    def scheme(self) -> QuantScheme | None:
        """None: there are as many as options."""
        return None

    def capacity(self, fixed_bytes: int, num_weights: int) -> int:
        """Return how many bytes the compressed layers may take."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * num_weights / 8)
        return int(self.budget or 0) - fixed_bytes

    def beyond(self, capacity: int, smallest: int, fixed_bytes: int) -> tuple[str, str]:
        """Say what the smallest budget is."""
        if self.bits_per_weight is not None:
            least = self.bits_per_weight * smallest / max(capacity, 1)
            return "bits_per_weight", f"{self.bits_per_weight:g} cannot be met; the least is {least:.4f}"
        return (
            "budget",
            f"{int(self.budget or 0):,} bytes cannot be met: with {self.num_bits[0]} bits everywhere the layers take "
            f"{smallest:,} bytes, and what stays as it is {fixed_bytes:,}, {smallest + fixed_bytes:,} in all",
        )

    def choose(self, costs: Sequence[LayerCosts], capacity: int) -> list[int]:
        """Return the option of each set of layers, with the least sum of losses within `capacity` bytes."""
        from orchestrator_quantization.knapsack import choose_within  # numpy

        return choose_within([cost.sizes for cost in costs], [cost.losses for cost in costs], capacity)
