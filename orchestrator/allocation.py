"""Mixed precision: what every option costs in every layer, and which layer gets which.

A `MixedMethod` names options and chooses among them; the core measures. A first walk, on the inputs of the
uncompressed model, compresses every layer by every option and keeps the errors of the outputs, tr(D H D^T) / n for the
difference D, of which no weight is kept; `orchestrator.sensitivity` says what an error costs. These numbers are stored
with the statistics: another budget is another choice and runs nothing again. The walk that follows compresses every
layer by its option.

What engines fuse (q/k/v, gate/up, the experts of a block) is one set with one option.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.canonical import digest_of
from orchestrator.compression import LayerCompressor, results_of
from orchestrator.errors import SpecError, StepError
from orchestrator.export import ModelWriter, result_specs
from orchestrator.job import Progress, WalkSettings, facts_of_walk
from orchestrator.layer_method import LayerCosts, LayerMethod, MixedMethod
from orchestrator.layers import fused_groups, is_skipped
from orchestrator.packing import packed_specs
from orchestrator.scheme import QuantScheme
from orchestrator.sensitivity import TOKENS, output_sensitivity
from orchestrator.shards import Shards, TensorSpec
from orchestrator.walk import walk

if TYPE_CHECKING:
    import torch

    from orchestrator.calibration import CalibrationSet
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.skeleton import Block
    from orchestrator.statistics import InputMoment

# By layer: what a squared error of its outputs costs, then that error for each option.
Table = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Allocation:
    """methods: by layer. metrics: `estimated_kl`, nats per token, and `bits_per_weight` of the layers as stored."""

    methods: Mapping[str, LayerMethod]
    metrics: Mapping[str, float]

    def schemes(self) -> dict[str, QuantScheme]:
        """Return the scheme of each layer."""
        return {name: scheme for name, method in self.methods.items() if (scheme := method.scheme()) is not None}


SURVEY_SHARE = 0.7  # of the work of a step


def allocate(
    checkpoint: Checkpoint,
    method: MixedMethod,
    calibration: CalibrationSet | None,
    *,
    skip: Sequence[str],
    settings: WalkSettings,
    scratch: Path,
    progress: Progress,
) -> Allocation:
    """Return by which option each layer is to be compressed.

    Raises `SpecError` for a budget that no assignment can meet, and what `walk` raises.
    """
    if calibration is None:
        raise StepError(f"{method.name} needs calibration data", remedy="put a calibrate step before it")
    options = method.options()
    names = _targets(checkpoint, skip)
    facts = facts_of_walk(checkpoint, settings, calibration.tokens_NT)
    key = digest_of([facts, names, TOKENS, [[o.name, o.model_dump(mode="json")] for o in options], settings.device])
    store = settings.records
    table = store.load_costs(key, names) if store else None
    if table is None:
        writer = ModelWriter(checkpoint, scratch / "survey")  # nothing is written
        report = walk(
            checkpoint,
            method,
            calibration,
            writer,
            skip=skip,
            progress=lambda fraction, message: progress(0.8 * fraction, message),
            settings=replace(settings, inputs="dense", state=settings.state and settings.state / "survey"),
            compressor=LayerSurvey,
        )
        costs = output_sensitivity(
            checkpoint,
            calibration.tokens_NT,
            scratch / "sensitivity",
            seed=0,
            device=settings.device,
            workers=settings.workers,
            progress=lambda fraction, message: progress(0.8 + 0.2 * fraction, message),
        )
        table = {
            name: [costs[name], *(report.layers[name][f"error {number}"] for number in range(len(options)))]
            for name in names
        }
        if store:
            store.save_costs(key, table)
    return _chosen(checkpoint, method, skip, table)


def planned_schemes(checkpoint: Checkpoint, method: LayerMethod, skip: Sequence[str]) -> Mapping[str, QuantScheme]:
    """Return the schemes of a result before it is there; of a mixed one with losses as they usually are.

    Raises `SpecError` for a budget that no assignment can meet. Imports no torch.
    """
    if isinstance(method, MixedMethod):
        return _chosen(checkpoint, method, skip, None).schemes()
    scheme = method.scheme()
    return {} if scheme is None else dict.fromkeys(_targets(checkpoint, skip), scheme)


class LayerSurvey(LayerCompressor):
    """Tries every option on every layer and reports what it costs; nothing is compressed or written."""

    def compress(self, block: Block, names: Sequence[str], record: InputMoment | None) -> dict[str, str]:
        """Report `error 0`, `error 1`, ... of layers that share an input, one for each option."""
        method = self._job.method
        moment, _ = self._usable(block, names, record)
        assert isinstance(method, MixedMethod) and moment is not None
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for number, option in enumerate(method.options()):
            for some, results in results_of(option, block, names, moment):
                for name, result in zip(some, results, strict=True):
                    delta_OI = result.weight_OI - block.linears[name].weight.data
                    found[name][f"error {number}"] = _output_error(delta_OI, moment)
        self.layers.update(found)
        return {}


def _output_error(delta_OI: torch.Tensor, moment: InputMoment) -> float:
    """The mean over tokens of |D x|^2."""
    import torch

    product_OI = (delta_OI @ moment.require_hessian()).mul_(delta_OI)
    return float(product_OI.sum(dtype=torch.float64)) / moment.num_tokens


def _targets(checkpoint: Checkpoint, skip: Sequence[str]) -> list[str]:
    return [layer.name for layer in checkpoint.block_layers() if not is_skipped(layer.name, skip)]


def _chosen(checkpoint: Checkpoint, method: MixedMethod, skip: Sequence[str], table: Table | None) -> Allocation:
    """Let the method choose; without a table on losses that fall fourfold with every bit.

    The header of a file depends on what is chosen, by some bytes: a choice is taken if the file that it makes keeps to
    the budget, and made again with less room otherwise. One option everywhere is always among what is compared.
    """
    menu = _Menu(checkpoint, method, _targets(checkpoint, skip), table)
    smallest = [min(range(len(menu.options)), key=cost.sizes.__getitem__) for cost in menu.costs]
    uniform = [[number] * len(menu.costs) for number in range(len(menu.options))]
    found = [numbers for numbers in (smallest, *uniform) if menu.fits(numbers)]
    if not found:
        least = menu.stored(smallest)
        fixed = menu.fixed(smallest)
        parameter, what = method.beyond(menu.capacity(smallest), least, fixed)
        raise SpecError(f"{parameter}: {what}", remedy="allow more, or add a smaller option")
    capacity = max(menu.capacity(numbers) for numbers in (smallest, *uniform))
    while capacity >= menu.stored(smallest):
        numbers = list(method.choose(menu.costs, capacity))
        if len(numbers) != len(menu.costs) or menu.stored(numbers) > capacity:
            raise StepError(f"{method.name} chose beyond its own budget", remedy="tell the plugin's authors")
        if menu.fits(numbers):
            found.insert(0, numbers)
            break
        capacity = min(menu.capacity(numbers), menu.stored(numbers) - 1)
    return menu.allocation(min(found, key=menu.loss))


class _Menu:
    """What can be chosen, and what a choice (the number of an option for each set of layers) comes to."""

    def __init__(self, checkpoint: Checkpoint, method: MixedMethod, names: Sequence[str], table: Table | None) -> None:
        self._checkpoint = checkpoint
        self._method = method
        self.options = list(method.options())
        self._schemes = [option.scheme() for option in self.options]
        self._shapes = {layer.name: layer for layer in checkpoint.block_layers()}
        sets = fused_groups(names)
        fused = {name for members in sets for name in members}
        numbers = range(len(self.options))
        self.costs = [
            LayerCosts(
                members,
                sum(self._weights(name) for name in members),
                tuple(sum(self._size(name, number) for name in members) for number in numbers),
                tuple(sum(self._loss(name, number, table) for name in members) for number in numbers),
            )
            for members in sorted([*sets, *((name,) for name in names if name not in fused)])
        ]
        self._num_weights = sum(cost.num_weights for cost in self.costs)

    def stored(self, numbers: Sequence[int]) -> int:
        """Bytes of the layers' tensors."""
        return sum(cost.sizes[number] for cost, number in zip(self.costs, numbers, strict=True))

    def loss(self, numbers: Sequence[int]) -> float:
        """Nats per token."""
        return sum(cost.losses[number] for cost, number in zip(self.costs, numbers, strict=True))

    def fixed(self, numbers: Sequence[int]) -> int:
        """Bytes of the weight files beside the layers' tensors: other tensors, and headers."""
        specs = result_specs(self._checkpoint, self.allocation(numbers).schemes())
        return Shards(self._checkpoint.path, specs).num_bytes - self.stored(numbers)

    def capacity(self, numbers: Sequence[int]) -> int:
        """Bytes that the layers' tensors may take if this is chosen."""
        return self._method.capacity(self.fixed(numbers), self._num_weights)

    def fits(self, numbers: Sequence[int]) -> bool:
        """Whether the files keep to the budget."""
        return self.stored(numbers) <= self.capacity(numbers)

    def allocation(self, numbers: Sequence[int]) -> Allocation:
        """Return the choice by layer, with what is known of it."""
        pairs = list(zip(self.costs, numbers, strict=True))
        metrics = {
            "estimated_kl": self.loss(numbers),
            "bits_per_weight": 8 * self.stored(numbers) / self._num_weights,
        }
        return Allocation({name: self.options[number] for cost, number in pairs for name in cost.layers}, metrics)

    def _weights(self, name: str) -> int:
        return self._shapes[name].out_features * self._shapes[name].in_features

    def _size(self, name: str, number: int) -> int:
        scheme = self._schemes[number]
        if scheme is None:
            raise StepError(f"option {number} of {self._method.name} has no scheme")
        parts = packed_specs(self._shapes[name].out_features, self._shapes[name].in_features, scheme)
        dtype = self._checkpoint.dtype_name
        return sum(TensorSpec(stored or dtype, shape).num_bytes for stored, shape in parts.values())

    def _loss(self, name: str, number: int, table: Table | None) -> float:
        if table is not None:
            return table[name][0] * table[name][1 + number]
        weights = self._weights(name)
        return float(weights * 4.0 ** (-8 * self._size(name, number) / weights))
