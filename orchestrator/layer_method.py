"""Methods that compress one linear layer at a time, while the core walks the model.

| kind            | verb                                                                                  |
|-----------------|---------------------------------------------------------------------------------------|
| `LayerMethod`   | `compress(weight_OI, statistic) -> LayerResult` (pure)                                |
| `ScalingMethod` | the same, after `input_scale(weights, statistic) -> s [I]` has gone into the weights   |
| `MixedMethod`   | `options()`, and `choose(costs, capacity)` which of them each set of layers gets       |

This module imports no torch; method files import it inside the functions that compute.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Literal

from orchestrator.method import Method
from orchestrator.scheme import QuantizedWeight, QuantScheme
from orchestrator.work import FLOAT32, Work

if TYPE_CHECKING:
    import torch

    from orchestrator.checkpoint import LayerShape
    from orchestrator.statistics import InputMoment


class Needs(StrEnum):
    """What a `LayerMethod` must know about a layer's inputs. The walk collects no more than that."""

    WEIGHT = "weight"  # nothing: the weight alone
    INPUT_NORM = "input norm"  # the first-order record: n, sum x, sum |x|, max |x|, sum x^2
    INPUT_MOMENT = "input moment"  # the same and H = X^T X


# What a method's blocks are calibrated on: the inputs that the compressed blocks before them produce, or those of the
# model as it enters the step (then statistics are shared by all methods and candidates).
InputMode = Literal["propagated", "dense"]


@dataclass(frozen=True)
class LayerResult:
    """What a `LayerMethod` returns.

    weight_OI: the compressed weight as plain numbers, shape and dtype of the input weight. For a quantized layer
        exactly ``encoding.dequantize(dtype)``: what an engine computes from the packed integers.
    encoding: the integers behind it, for a quantized layer.
    metrics: numbers worth recording: the proxy loss, damping that had to be raised, dead columns, fallbacks.
    """

    weight_OI: torch.Tensor
    encoding: QuantizedWeight | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class LayerMethod(Method):
    """Compresses one linear layer at a time; the core walks the model, so that no method ever holds all of it."""

    needs: ClassVar[Needs]
    inputs: ClassVar[InputMode] = "propagated"  # what blocks are calibrated on, unless the specification says otherwise

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        """Return (parameter name, what is wrong) if this layer cannot be compressed. Called while planning."""
        return None

    def for_dtype(self, dtype: str) -> LayerMethod:
        """Return this method with what follows from the model's dtype (as "bfloat16") filled in, while planning.

        Raises `SpecError` if the parameters contradict it.
        """
        return self

    def scheme(self) -> QuantScheme | None:
        """The quantization scheme of the result; None for a pruning method."""
        return None

    def sparsity_pattern(self) -> str | None:
        """Where the zeros of a pruned layer fall, as "2:4" or "row"; checked on the stored bytes. None: no claim."""
        return None

    def compress_together(self, weights: Sequence[torch.Tensor], statistic: InputMoment | None) -> list[LayerResult]:
        """Return the compressed layers of a group that reads one input (q/k/v, gate/up), in their order.

        Override it where a group can share work; each result must be what `compress` would give, up to rounding.
        """
        return [self.compress(weight_OI, statistic) for weight_OI in weights]

    def working_bytes(self, rows: int, in_features: int) -> int:
        """Memory that compressing layers of `rows` rows in all takes beside their weights and the record, results
        included: what `max_memory_gib` is kept with. The layers come one by one unless `compress_together` is the
        method's own. Default: the result and four more of its size.
        """
        return 5 * FLOAT32 * rows * in_features

    def effort(self, rows: int, in_features: int) -> Work:
        """The arithmetic of the same, for `plan`. Default: some passes over the weight."""
        return Work(moved_bytes=100.0 * rows * in_features, calls=40)

    @abstractmethod
    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Return the compressed layer; pure: neither argument is changed, no global state is used.

        weight_OI: float32, contiguous. statistic: None if `needs` is `Needs.WEIGHT`.
        """


class ScalingMethod(LayerMethod):
    """A `LayerMethod` that first moves scale from the inputs of layers into their weights.

    The walk finds what produces an input and can be divided (`orchestrator.folding`). It calibrates all layers of a
    block at once, divides by what `input_scale` returns, and only then calls `compress`, with the scaled weight and
    the statistic of the divided input.
    """

    @abstractmethod
    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        """Return s [I], finite and positive, by which the input is divided and every weight's columns multiplied.

        weights: float32 [O, I] each, of all layers that read the input. Pure, as `compress`.
        """


@dataclass(frozen=True)
class LayerCosts:
    """What each option of a `MixedMethod` costs in one set of layers that engines fuse, so that all must get the same.

    num_weights: of all layers of the set. sizes: bytes of their stored tensors, for each option.
    losses: by how much the KL divergence of the model's next tokens is estimated to grow, nats per token
        (`orchestrator.sensitivity`); of several layers they add up.
    """

    layers: tuple[str, ...]
    num_weights: int
    sizes: tuple[int, ...]
    losses: tuple[float, ...]


class MixedMethod(LayerMethod):
    """A `LayerMethod` that compresses different layers differently, within a budget of bytes.

    Every option is tried on every layer, on the inputs of the uncompressed model, and what it costs is kept; the method
    chooses; each layer is then compressed by the option chosen for it. Costs are kept with the statistics, so
    that another budget is a matter of choosing again. An option is no `ScalingMethod`.
    """

    needs: ClassVar[Needs] = Needs.INPUT_MOMENT

    @abstractmethod
    def options(self) -> Sequence[LayerMethod]:
        """Return what a layer can be compressed by, each with a scheme of its own."""

    @abstractmethod
    def capacity(self, fixed_bytes: int, num_weights: int) -> int:
        """Return how many bytes the compressed layers may take.

        fixed_bytes: of the weight files, without those layers. num_weights: of those layers.
        """

    @abstractmethod
    def beyond(self, capacity: int, smallest: int, fixed_bytes: int) -> tuple[str, str]:
        """Return (parameter name, what is wrong) for a capacity below the smallest that can be chosen, bytes."""

    @abstractmethod
    def choose(self, costs: Sequence[LayerCosts], capacity: int) -> Sequence[int]:
        """Return the number of an option for each set of layers; their sizes add up to at most `capacity`. Pure."""

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        """Refuse what an option refuses."""
        return next(filter(None, (option.check_layer(layer) for option in self.options())), None)

    def working_bytes(self, rows: int, in_features: int) -> int:
        """Options are tried one after the other; an error and its product with H come to it."""
        largest = max(option.working_bytes(rows, in_features) for option in self.options())
        return largest + 2 * FLOAT32 * rows * in_features

    def effort(self, rows: int, in_features: int) -> Work:
        """All options once, with the product of each error with H, and the chosen one again."""
        efforts = [option.effort(rows, in_features) for option in self.options()]
        product = Work(operations=2.0 * rows * in_features**2, moved_bytes=24.0 * rows * in_features, calls=6)
        total = max(efforts, key=lambda work: work.operations)
        for work in efforts:
            total = total.then(work).then(product)
        return total

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        """Not to be asked: which option a layer gets depends on the others."""
        raise TypeError(f"{type(self).__name__} compresses by one of its options")
