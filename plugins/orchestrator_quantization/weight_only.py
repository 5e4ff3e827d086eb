"""What methods share: the dtype of scales; the parameters of a weight-only grid, its scheme, and what fits a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from orchestrator.api import Invariant, LayerMethod, LayerShape, QuantScheme, SpecError

if TYPE_CHECKING:
    import torch


def _no_group_is_minus_one(value: Any) -> Any:
    """-1 and null both mean one scale per output channel; one spelling gives one fingerprint."""
    return None if value == -1 else value


GroupSize = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_no_group_is_minus_one)]


class StoredScales(LayerMethod):
    """The element type of a quantized weight's scales. Zero is a grid point of every method here."""

    keeps: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ZEROS})

    scale_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Element type that scales are stored in: the model's own, which 'auto' stands for."
    )

    def for_dtype(self, dtype: str) -> StoredScales:
        """Take the model's dtype for the scales: engines multiply in it, so another one would give other weights."""
        if self.scale_dtype not in ("auto", dtype):
            raise SpecError(
                f"scale_dtype is {self.scale_dtype}, but the model is loaded in {dtype}",
                remedy="leave scale_dtype out, or set the model's dtype",
            )
        return self.model_copy(update={"scale_dtype": dtype})

    def storage_dtype(self) -> torch.dtype:
        """`scale_dtype` as torch knows it; bfloat16 for a method that was not planned for a model."""
        import torch

        dtype: torch.dtype = getattr(torch, "bfloat16" if self.scale_dtype == "auto" else self.scale_dtype)
        return dtype


class WeightOnly(StoredScales):
    """Parameters of a weight-only integer grid."""

    num_bits: int = Field(4, ge=2, le=8, description="Width of a stored integer, bits.")
    group_size: GroupSize = Field(
        128, description="Neighbouring input features that share a scale; null or -1: one scale per output channel."
    )
    symmetric: bool = Field(True, description="True: the grid has no zero point. False: one zero point per group.")
    clip: Literal["none", "mse"] = Field(
        "none", description="Range of a group: its extremes, or the share of them with the least squared error."
    )

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        """Refuse groups that do not fill the rows."""
        if self.group_size is not None and layer.in_features % self.group_size:
            return "group_size", f"{self.group_size} does not divide in_features {layer.in_features}"
        return None

    def scheme(self) -> QuantScheme:
        """The scheme of the result, in the words of compressed-tensors."""
        return QuantScheme(
            num_bits=self.num_bits,
            symmetric=self.symmetric,
            strategy="channel" if self.group_size is None else "group",
            group_size=self.group_size,
        )
