"""Layers as real models have them, for a `LayerMethod` to be tried on; shapes are those its `check_layer` accepts.

Shape legend: O = out features, I = in features, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.checkpoint import LayerShape
from orchestrator.layer_method import LayerMethod, Needs
from orchestrator.statistics import InputMoment, InputMomentBuilder

if TYPE_CHECKING:
    import torch

# In features to choose from: multiples of the usual group sizes, and what many models have.
WIDTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
ODD_WIDTH = 37  # prime: no group size and no N:M pattern divides it


@dataclass(frozen=True)
class LayerCase:
    """A layer and the inputs that it sees; `statistic` reduces the inputs to what a method asks for."""

    label: str
    weight_OI: torch.Tensor
    inputs_TI: torch.Tensor

    def statistic(self, needs: Needs) -> InputMoment | None:
        """A fresh record of the inputs that holds what `needs` says and no more."""
        if needs is Needs.WEIGHT:
            return None
        builder = InputMomentBuilder(self.inputs_TI.shape[1], with_hessian=needs is Needs.INPUT_MOMENT)
        builder.add(self.inputs_TI)
        return builder.finish()


def accepted_widths(method: LayerMethod) -> list[int]:
    """The in features of `WIDTHS` that the method accepts, smallest first."""
    return [width for width in WIDTHS if method.check_layer(layer_shape(16, width)) is None]


def layer_shape(num_out: int, num_in: int) -> LayerShape:
    """A layer with a usual name."""
    return LayerShape("model.layers.0.mlp.up_proj", num_out, num_in)


def ordinary(num_out: int, num_in: int) -> LayerCase:
    """Bell-shaped weights; correlated inputs, some features stronger than others; more tokens than features."""
    import torch

    draw = torch.Generator().manual_seed(1000 * num_out + num_in)
    weight_OI = torch.randn(num_out, num_in, generator=draw) / num_in**0.5
    mixing_II = torch.eye(num_in) + 0.3 * torch.randn(num_in, num_in, generator=draw) / num_in**0.5
    strength_I = torch.exp(0.7 * torch.randn(num_in, generator=draw))
    inputs_TI = torch.randn(2 * num_in, num_in, generator=draw) @ mixing_II * strength_I + 0.1
    return LayerCase(f"an ordinary layer {num_out} x {num_in}", weight_OI, inputs_TI)


def cases(widths: list[int]) -> Iterator[LayerCase]:
    """All cases, the ordinary ones first. widths: in features that the method accepts, smallest first."""
    import torch

    narrow, wide = widths[0], widths[min(1, len(widths) - 1)]
    yield ordinary(24, narrow)
    yield ordinary(2 * narrow + 8, narrow)
    yield ordinary(8, wide)
    yield ordinary(1, narrow)

    def changed(label: str, change: Callable[[torch.Tensor, torch.Tensor], object]) -> LayerCase:
        case = ordinary(16, narrow)
        change(case.weight_OI, case.inputs_TI)
        return LayerCase(f"a layer {label} (16 x {narrow})", case.weight_OI, case.inputs_TI)

    yield changed("with three rows of zeros", lambda weight_OI, _: weight_OI[::6].zero_())
    yield changed("of zeros only", lambda weight_OI, _: weight_OI.zero_())
    yield changed("with one value everywhere", lambda weight_OI, _: weight_OI.fill_(0.0625))
    yield changed("with five inputs that never occurred", lambda _, inputs_TI: inputs_TI[:, :5].zero_())
    yield changed("with one input a hundred times stronger", lambda _, inputs_TI: inputs_TI[:, 7].mul_(100))
    yield changed("with one weight a hundred times larger", lambda weight_OI, _: weight_OI[3, 7].mul_(100))
    yield changed("with weights of about 1e-6", lambda weight_OI, _: weight_OI.mul_(1e-6))
    few = ordinary(16, narrow)
    inputs_TI = few.inputs_TI[: narrow // 4].contiguous()
    yield LayerCase(f"a layer with fewer tokens than inputs (16 x {narrow})", few.weight_OI, inputs_TI)
    stored = ordinary(16, narrow)
    weight_OI = stored.weight_OI.to(torch.bfloat16).float()
    yield LayerCase(f"a layer stored in bfloat16 (16 x {narrow})", weight_OI, stored.inputs_TI)


def pruned(widths: list[int]) -> Iterator[LayerCase]:
    """Layers with zeros that a pruning step made: in half of every run of four, in whole columns and rows, in most."""
    import torch

    case = ordinary(16, widths[0])
    half_OI = case.weight_OI.clone()
    half_OI[:, 0::4] = 0.0
    half_OI[:, 2::4] = 0.0
    columns_OI = case.weight_OI.clone()
    columns_OI[:, : widths[0] // 3] = 0.0
    columns_OI[4] = 0.0
    draw = torch.Generator().manual_seed(7)
    most_OI = case.weight_OI * (torch.rand(case.weight_OI.shape, generator=draw) < 0.1)
    for label, weight_OI in (("half", half_OI), ("whole columns", columns_OI), ("nine tenths", most_OI)):
        yield LayerCase(f"a layer with {label} of its weights pruned", weight_OI, case.inputs_TI)
