"""What the walk does to layers: compress those that share an input, write them, and keep what was reported.

Shape legend: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError, Problem, StepError
from orchestrator.layer_method import LayerMethod, LayerResult, Needs
from orchestrator.parallel import in_parallel
from orchestrator.statistics import InputMoment, alike
from orchestrator.usage import give_back_memory

if TYPE_CHECKING:
    import torch

    from orchestrator.job import Job
    from orchestrator.skeleton import Block, Skeleton
    from orchestrator.stored import StoredLayers

# Metrics: layers with fewer tokens than inputs; layers of experts with few tokens, and with none.
RANK_DEFICIENT, STARVED, UNSEEN = "rank_deficient_layers", "starved_experts", "unseen_experts"


@dataclass(frozen=True)
class WalkReport:
    """What the walk found out.

    layers: what the method reported of each layer, by layer name, and `zero_fraction`.
    metrics: of the whole model: `layers`, `weights` (compressed ones), `rank_deficient_layers` (fewer calibration
        tokens than in features, so that H is singular), `starved_experts` (layers of experts among them) and
        `unseen_experts` (layers of experts that saw no token at all, and were compressed as if all inputs were
        alike), and the reported numbers: of "damping…" and "max_…" the largest, of "relative_…" and "…fraction…" the
        mean over weights, of "tokens" the smallest, else the sum.
    """

    metrics: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]


class LayerCompressor:
    """Applies methods to layers. `layers`: what it reported of each; may be filled in from an earlier run."""

    def __init__(self, job: Job, model: Skeleton | StoredLayers) -> None:
        self._job = job
        self._writer = job.writer
        self._model = model
        self._with_hessian = job.method.needs is Needs.INPUT_MOMENT
        self.layers: dict[str, Mapping[str, float]] = {}
        self.facts: dict[str, Mapping[str, float]] = {}  # what else is to be reported of a layer

    def compress(self, block: Block, names: Sequence[str], record: InputMoment | None) -> dict[str, str]:
        """Compress layers that share an input, write them, and leave the results in the modules."""
        record, facts = self._usable(block, names, record)
        written: dict[str, str] = {}
        for some, results in self._results(block, names, record):
            pairs = zip(some, results, strict=True)
            written |= dict(in_parallel([partial(self._finish, block, name, result, facts) for name, result in pairs]))
        give_back_memory()
        return written

    def _usable(
        self, block: Block, names: Sequence[str], record: InputMoment | None
    ) -> tuple[InputMoment | None, dict[str, float]]:
        """Return the record, or what stands for one of an expert without tokens, and what is to be said of it."""
        if record is None:
            return None, {}
        expert = names[0] in block.experts
        if expert and record.num_tokens == 0:
            return alike(record), {UNSEEN: 1, "tokens": 0}
        facts: dict[str, float] = {}
        if record.num_tokens < len(record.sum_I):
            facts = {RANK_DEFICIENT: 1} if self._with_hessian else {}
            facts |= {STARVED: 1} if expert else {}
        return record, facts

    def _finish(self, block: Block, name: str, result: LayerResult, facts: Mapping[str, float]) -> tuple[str, str]:
        """Write a layer's result and put it into the module; return its name and a digest of what was written."""
        stored_OI, digest = self._store(name, result, block.linears[name].weight)
        zero_fraction = int((stored_OI == 0).sum()) / stored_OI.numel()
        self.layers[name] = {**result.metrics, "zero_fraction": zero_fraction, **facts, **self.facts.pop(name, {})}
        block.linears[name].weight.data = stored_OI.float()
        return name, digest

    def _results(
        self, block: Block, names: Sequence[str], record: InputMoment | None
    ) -> Iterator[tuple[Sequence[str], list[LayerResult]]]:
        """Yield names and compressed layers, method by method."""
        for method, alike_names in groupby(names, self._job.method_of):
            yield from results_of(method, block, list(alike_names), record)

    def _store(self, name: str, result: LayerResult, weight_OI: torch.Tensor) -> tuple[torch.Tensor, str]:
        """Write the result; return the weight [O, I] as it will be loaded, in the checkpoint's dtype, and a digest."""
        expected = name in self._writer.schemes
        if (result.encoding is not None) != expected:
            raise StepError(f"{self._job.method.name} returned {'no' if expected else 'an'} encoding for {name}")
        if result.weight_OI.shape != weight_OI.shape:
            shapes = f"{tuple(result.weight_OI.shape)} instead of {tuple(weight_OI.shape)}"
            raise StepError(f"{self._job.method.name} returned shape {shapes} for {name}")
        dtype = self._model.checkpoint.torch_dtype
        stored_OI = result.weight_OI.to(dtype) if result.encoding is None else result.encoding.dequantize(dtype)
        if not stored_OI.isfinite().all():
            raise StepError(f"{self._job.method.name} made {name} not finite")
        if result.encoding is None:
            return stored_OI, self._writer.add(f"{name}.weight", self._model.as_stored(name, stored_OI))
        return stored_OI, self._writer.add_quantized(name, result.encoding)

    def report(self, names: Sequence[str]) -> WalkReport:
        """Put together what the layers reported, as `WalkReport` says."""
        layers = {name: self.layers[name] for name in names}
        shapes = self._writer.layers
        sizes = {name: shapes[name].out_features * shapes[name].in_features for name in layers}
        metrics: dict[str, float] = {"layers": len(layers), "weights": sum(sizes.values())}
        if self._with_hessian:
            metrics[RANK_DEFICIENT] = 0
        if self._job.method.needs is not Needs.WEIGHT and any(block.experts for block in self._model.blocks):
            metrics |= {STARVED: 0, UNSEEN: 0}
        for name in sorted({name for values in layers.values() for name in values}):
            found = {layer: values[name] for layer, values in layers.items() if name in values}
            if name.startswith(("damping", "max_")):
                metrics[name] = max(found.values())
            elif name == "tokens":
                metrics[name] = min(found.values())
            elif name.startswith("relative_") or "fraction" in name:
                weights = sum(sizes[layer] for layer in found)
                metrics[name] = sum(value * sizes[layer] for layer, value in found.items()) / weights
            else:
                metrics[name] = sum(found.values())
        return WalkReport(metrics, layers)


def results_of(
    method: LayerMethod, block: Block, names: Sequence[str], record: InputMoment | None
) -> Iterator[tuple[Sequence[str], list[LayerResult]]]:
    """Yield names and compressed layers, all at once if the method gains by it, else one by one."""
    weights = [block.linears[name].weight.data for name in names]
    together = type(method).compress_together is not LayerMethod.compress_together
    for part in [slice(None)] if together else [slice(i, i + 1) for i in range(len(names))]:
        try:
            results = method.compress_together(weights[part], record)
        except OrchestratorError as error:
            where = f"layer {', '.join(names[part])}"
            raise type(error)([Problem(f"{p.what} ({where})", p.where, p.remedy) for p in error.problems]) from error
        except Exception as error:
            error.add_note(f"while {method.name} compressed {', '.join(names[part])}")
            raise
        if len(results) != len(weights[part]):
            raise StepError(f"{method.name} returned {len(results)} layers for {len(weights[part])}")
        yield names[part], results
