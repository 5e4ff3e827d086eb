"""Methods with one bug each, for `orchestrator.testing` to find. Each is right but for what its docstring says."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field, PrivateAttr

from orchestrator.api import (
    CalibrationSet,
    Calibrator,
    Checkpoint,
    Context,
    Evaluator,
    ExportFacts,
    ExportFormat,
    InputMoment,
    Invariant,
    KVPlan,
    LayerCosts,
    LayerMethod,
    LayerResult,
    LayerShape,
    Measured,
    MixedMethod,
    ModelMethod,
    ModelResult,
    ModelShape,
    Needs,
    PreflightError,
    Publisher,
    PublishError,
    QuantizedWeight,
    QuantScheme,
    Quotient,
    Release,
    Samples,
    ScalingMethod,
    ServingEngine,
    SpecError,
    Stage,
    open_store,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_calls = itertools.count()
_ZEROS = frozenset({Invariant.ZEROS})


class Halve(LayerMethod):
    """No bug: the smaller half of every row becomes zero."""

    stage: ClassVar[Stage] = Stage.PRUNE
    name: ClassVar[str] = "halve"
    paper: ClassVar[str] = "Keep the larger half."
    needs: ClassVar[Needs] = Needs.WEIGHT
    keeps: ClassVar[frozenset[Invariant]] = _ZEROS

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(halved(weight_OI))


def halved(weight_OI: torch.Tensor, score_OI: torch.Tensor | None = None) -> torch.Tensor:
    """Set the half of each row with the lowest score (default: the absolute weight) to zero, zeros first."""
    score_OI = (weight_OI.abs() if score_OI is None else score_OI).masked_fill(weight_OI == 0, -1.0)
    return weight_OI.scatter(1, score_OI.argsort(dim=1, stable=True)[:, : weight_OI.shape[1] // 2], 0.0)


class Scaled(ScalingMethod, Halve):
    """No bug: divides every input by its mean size."""

    needs: ClassVar[Needs] = Needs.INPUT_NORM

    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        return (statistic.sum_abs_I / statistic.num_tokens).clamp(min=1e-4)


class ScalesByZero(Scaled):
    """Divides by the mean size of an input, which can be zero."""

    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        return statistic.sum_abs_I / statistic.num_tokens


class ScalesInPlace(Scaled):
    """Takes the mean where the sum was."""

    def input_scale(self, weights: Sequence[torch.Tensor], statistic: InputMoment) -> torch.Tensor:
        return statistic.sum_abs_I.div_(statistic.num_tokens).clamp(min=1e-4)


class Mutates(Halve):
    """Changes its argument."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        weight_OI.copy_(halved(weight_OI))
        return LayerResult(weight_OI.clone())


class MutatesStatistic(Halve):
    """Damps the shared H in place."""

    needs: ClassVar[Needs] = Needs.INPUT_MOMENT

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        assert statistic is not None
        statistic.require_hessian().diagonal().add_(1.0)
        return LayerResult(halved(weight_OI))


class GlobalRandom(Halve):
    """Breaks ties with the global generator."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        import torch

        return LayerResult(halved(weight_OI, weight_OI.abs() + torch.rand(weight_OI.shape)))


class HiddenGlobalRandom(Halve):
    """Reads the global generator and puts its state back."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        import torch

        with torch.random.fork_rng(devices=[]):
            return LayerResult(halved(weight_OI, weight_OI.abs() + torch.rand(weight_OI.shape)))


class Nondeterministic(Halve):
    """Its result depends on how often it was called."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(halved(weight_OI) * (1.0 + 0.001 * next(_calls)))


class LosesZeros(Halve):
    """Says that it keeps zeros, and spares zeros that are there already, with a small number in their place."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(halved(weight_OI.masked_fill(weight_OI == 0, 0.001)))


class PrunesNothing(Halve):
    """A pruning method that leaves the weight as it is."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(weight_OI.clone())


class UndeclaredNeed(Halve):
    """Needs H and declares that the weight alone will do."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        assert statistic is not None
        return LayerResult(halved(weight_OI, weight_OI.abs() * statistic.require_hessian().diagonal()))


class NotANumber(Halve):
    """Divides by the norm of a row, which can be zero."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        pruned_OI = halved(weight_OI)
        return LayerResult(pruned_OI * weight_OI.norm(dim=1, keepdim=True) / pruned_OI.norm(dim=1, keepdim=True))


class Transposed(Halve):
    """Returns a view with the strides of a transposed tensor."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(halved(weight_OI).T.contiguous().T)


class WrongPattern(Halve):
    """Names a pattern, but halves whole rows."""

    pattern: str = Field("2:4", pattern=r"^(2:4|4:8)$", description="At most n kept of every m inputs.")

    def check_layer(self, layer: LayerShape) -> tuple[str, str] | None:
        return ("pattern", "rows are not whole runs") if layer.in_features % 8 else None

    def sparsity_pattern(self) -> str | None:
        return self.pattern


class UnclaimedPattern(WrongPattern):
    """Prunes 2:4 as its parameter says, and does not claim it."""

    def sparsity_pattern(self) -> str | None:
        return None

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        runs_OGM = weight_OI.unflatten(1, (-1, 4))
        score_OGM = runs_OGM.abs().masked_fill(runs_OGM == 0, -1.0)
        return LayerResult(runs_OGM.scatter(2, score_OGM.argsort(dim=2, stable=True)[..., :2], 0.0).flatten(1))


class UnlikeRows(Halve):
    """Claims as many zeros in every row, and prunes one row more."""

    def sparsity_pattern(self) -> str | None:
        return "row"

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        pruned_OI = halved(weight_OI)
        pruned_OI[0] = 0.0
        return LayerResult(pruned_OI)


class GradModeLeft(Halve):
    """Turns gradients off for good."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        import torch

        torch.set_grad_enabled(False)
        return LayerResult(halved(weight_OI))


class Undescribed(Halve):
    """Has a parameter without description."""

    strength: float = Field(1.0, gt=0)


class Unbounded(Halve):
    """Has a number that may be anything."""

    strength: float | None = Field(1.0, description="Any number.")


class Thawed(Halve):
    """Its parameters can be changed."""

    model_config = ConfigDict(frozen=False)


class Stateful(Halve):
    """Keeps state between layers."""

    _seen: int = PrivateAttr(0)


class Lax(Halve):
    """Ignores unknown parameters."""

    model_config = ConfigDict(extra="ignore")


class RefusesParameters(Halve):
    """Its preflight finds fault with what it was given."""

    def preflight(self) -> None:
        raise PreflightError("the licence server is not reachable")


class Eight(LayerMethod):
    """No bug: symmetric 8-bit integers, one scale per output channel."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "eight"
    paper: ClassVar[str] = "Round to nearest."
    needs: ClassVar[Needs] = Needs.WEIGHT
    keeps: ClassVar[frozenset[Invariant]] = _ZEROS

    def for_dtype(self, dtype: str) -> LayerMethod:
        if dtype != "bfloat16":
            raise SpecError(f"eight knows only bfloat16 models, not {dtype}")
        return self

    def scheme(self) -> QuantScheme:
        return QuantScheme(num_bits=8, strategy="channel", group_size=None)

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        import torch

        encoding = self.encode(weight_OI)
        return LayerResult(encoding.dequantize(torch.float32), encoding)

    def encode(self, weight_OI: torch.Tensor, limit: int = 127) -> QuantizedWeight:
        """Round to nearest, integers up to `limit`."""
        import torch

        scale_O1 = (weight_OI.abs().amax(1, keepdim=True) / limit).to(torch.bfloat16)
        scale_O1 = torch.where(scale_O1 == 0, 1.0, scale_O1)
        q_OI = (weight_OI / scale_O1.float()).round().clamp(-128, 127).to(torch.int8)
        return QuantizedWeight(q_OI, scale_O1, None, self.scheme())


class IgnoresDtype(Eight):
    """Stores bfloat16 scales in a model of any dtype."""

    def for_dtype(self, dtype: str) -> LayerMethod:
        return self


class WrongEncoding(Eight):
    """Returns the weight before rounding."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(weight_OI.clone(), self.encode(weight_OI))


class OutOfRange(Eight):
    """Says 4 bits and uses 8."""

    def scheme(self) -> QuantScheme:
        return QuantScheme(num_bits=4, strategy="channel", group_size=None)


class OtherScheme(Eight):
    """The encoding's scheme is not the one that `scheme()` announced."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        import torch

        encoding = replace(self.encode(weight_OI), scheme=self.scheme().model_copy(update={"symmetric": False}))
        return LayerResult(encoding.dequantize(torch.float32), encoding)


class NoEncoding(Eight):
    """Forgets the encoding."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return LayerResult(weight_OI.clone())


class Useless(Eight):
    """Stores the negative of the weight."""

    def compress(self, weight_OI: torch.Tensor, statistic: InputMoment | None) -> LayerResult:
        return super().compress(-weight_OI, statistic)


class Either(MixedMethod):
    """No bug: as many layers as fit are quantized in the wider way."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    name: ClassVar[str] = "either"
    paper: ClassVar[str] = "First come, first served."

    def options(self) -> Sequence[LayerMethod]:
        return [Narrow(), Eight()]

    def capacity(self, fixed_bytes: int, num_weights: int) -> int:
        return num_weights

    def beyond(self, capacity: int, smallest: int, fixed_bytes: int) -> tuple[str, str]:
        return "budget", f"{capacity} is less than {smallest}"

    def choose(self, costs: Sequence[LayerCosts], capacity: int) -> Sequence[int]:
        left = capacity - sum(cost.sizes[0] for cost in costs)
        chosen = []
        for cost in costs:
            wider = cost.sizes[1] - cost.sizes[0] <= left
            left -= (cost.sizes[1] - cost.sizes[0]) * wider
            chosen.append(int(wider))
        return chosen


class Narrow(Eight):
    """No bug: the same in six bits."""

    def encode(self, weight_OI: torch.Tensor, limit: int = 31) -> QuantizedWeight:
        return super().encode(weight_OI, limit)

    def scheme(self) -> QuantScheme:
        return QuantScheme(num_bits=6, strategy="channel", group_size=None)


class ChoosesTooMuch(Either):
    """Takes the best option everywhere, whatever the capacity."""

    def choose(self, costs: Sequence[LayerCosts], capacity: int) -> Sequence[int]:
        return [1 for _ in costs]


class SameOptions(Either):
    """Offers one scheme twice."""

    def options(self) -> Sequence[LayerMethod]:
        return [Eight(), Eight()]


class Nudge(ModelMethod):
    """No bug: every weight of the model shrinks a little."""

    stage: ClassVar[Stage] = Stage.DISTILL
    name: ClassVar[str] = "nudge"
    paper: ClassVar[str] = "Weight decay without training."
    keeps: ClassVar[frozenset[Invariant]] = _ZEROS

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        for parameter in model.parameters():
            parameter.data.mul_(0.99)
        context.progress(1.0, "done")
        return ModelResult(model, {"factor": 0.99})


class ForgetsMask(Nudge):
    """Says that it keeps zeros, and adds noise to all weights."""

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        import torch

        draw = torch.Generator().manual_seed(context.seed)
        for parameter in model.parameters():
            parameter.data.add_(0.001 * torch.randn(parameter.shape, generator=draw))
        return ModelResult(model)


class LeavesGrid(Nudge):
    """Says that it keeps grids, and gives weights that are on none: the model that is saved is not the returned one."""

    keeps: ClassVar[frozenset[Invariant]] = _ZEROS | {Invariant.GRID}


class SeedsGlobally(Nudge):
    """Reproducible, at the price of the process's random state."""

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        import torch

        torch.manual_seed(context.seed)
        for parameter in model.parameters():
            parameter.data.mul_(1 + 0.001 * torch.rand(()))
        return ModelResult(model)


class WritesTeacher(Nudge):
    """Leaves a file with the dense model."""

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        (context.dense.path / "config.json").write_text("{}", encoding="utf-8")
        return ModelResult(model)


class PercentProgress(Nudge):
    """Counts progress to a hundred."""

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        context.progress(50, "half")
        return ModelResult(model)


class LosesBlock(Nudge):
    """Removes a decoder block, of which planning knows nothing."""

    keeps: ClassVar[frozenset[Invariant]] = frozenset()

    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        body: Any = model.base_model
        body.layers = body.layers[:-1]
        model.config.num_hidden_layers -= 1
        return ModelResult(model)


class Firsts(Calibrator):
    """No bug: windows of random tokens."""

    stage: ClassVar[Stage] = Stage.CALIBRATE
    name: ClassVar[str] = "firsts"
    paper: ClassVar[str] = "Random tokens."

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        import torch

        tokens_NT = torch.randint(len(tokenizer), (4, 16), generator=torch.Generator().manual_seed(seed))
        return CalibrationSet(tokens_NT, {"source": "random tokens", "seed": seed})


class IgnoresSeed(Firsts):
    """Always draws the same."""

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        return super().sample(tokenizer, 0)


class Int32Tokens(Firsts):
    """Has 32-bit tokens."""

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        drawn = super().sample(tokenizer, seed)
        return replace(drawn, tokens_NT=drawn.tokens_NT.int())


class PadsWithMinusOne(Firsts):
    """Uses a token that is none."""

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        drawn = super().sample(tokenizer, seed)
        drawn.tokens_NT[0, 0] = -1
        return drawn


class TimeStamped(Firsts):
    """Its provenance tells the time."""

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        return replace(super().sample(tokenizer, seed), provenance={"drawn_at": time.time_ns()})


class PathInProvenance(Firsts):
    """Its provenance is no JSON."""

    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        return replace(super().sample(tokenizer, seed), provenance={"source": Path("text.txt")})


class Bytes(Evaluator):
    """No bug: bytes of the weight files."""

    stage: ClassVar[Stage] = Stage.VALIDATE
    name: ClassVar[str] = "bytes"
    paper: ClassVar[str] = "File sizes."
    metrics: ClassVar[Mapping[str, str]] = {"weight": "bytes, compressed", "dense_weight": "bytes, dense"}

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        return {"weight": candidate.weight_bytes(), "dense_weight": baseline.weight_bytes()}


class Unmeasured(Bytes):
    """Declares a metric that it does not measure."""

    metrics: ClassVar[Mapping[str, str]] = {**Bytes.metrics, "ratio": "the one by the other"}


class Undeclared(Bytes):
    """Measures what it does not declare."""

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        return {**super().measure(candidate, baseline, context), "surprise": 1.0}


class Unfair(Bytes):
    """Counts the dense model's tokenizer, but not the candidate's."""

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        return {"weight": candidate.weight_bytes(), "dense_weight": baseline.weight_bytes() + 1}


class InfiniteMetric(Bytes):
    """Divides by zero in float."""

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        return {"weight": float("inf"), "dense_weight": baseline.weight_bytes()}


class FallingCurve(Bytes):
    """Gives a curve whose places go back."""

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        return Measured(dict(super().measure(candidate, baseline, context)), {"size": [(2, 1.0), (1, 2.0)]})


class ForeignSamples(Bytes):
    """Gives samples of another number than it reports."""

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Measured:
        metrics = dict(super().measure(candidate, baseline, context))
        name = sorted(metrics)[0]
        samples = Samples("window", {"sum": [1.0, 2.0], "units": [1.0, 1.0]}, {name: Quotient("sum", "units")})
        return Measured(metrics, samples=[samples])


class SamplesOfNothing(Bytes):
    """Declares samples and gives none."""

    sampled: ClassVar[frozenset[str]] = frozenset({"weight"})


class Drifts(Bytes):
    """Measures something else every time."""

    metrics: ClassVar[Mapping[str, str]] = {"weight": "bytes, compressed"}

    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        return {"weight": candidate.weight_bytes() + next(_calls)}


class WholePublisher(Publisher):
    """No bug."""

    stage: ClassVar[Stage] = Stage.REGISTER
    name: ClassVar[str] = "whole"
    paper: ClassVar[str] = "A copy."

    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> Release:
        return open_store(str(self.uri)).publish(name, bundle, dict(manifest))

    def find(self, name: str) -> Release | None:
        return open_store(str(self.uri)).read_release(name)


class Forgets(WholePublisher):
    """Never finds what it published."""

    def find(self, name: str) -> Release | None:
        return None


class AddsFile(WholePublisher):
    """Writes into the bundle that it was given."""

    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> Release:
        (bundle / "README.md").write_text("published\n", encoding="utf-8")
        return super().publish(bundle, manifest, name)


class Renamed(WholePublisher):
    """Makes a new release of everything, whatever the name."""

    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> Release:
        return super().publish(bundle, manifest, f"{name}-{next(_calls)}")


class FailsOnRetry(WholePublisher):
    """Takes its own release for somebody else's."""

    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> Release:
        if self.find(name) is not None:
            raise PublishError(f"{name} exists")
        return super().publish(bundle, manifest, name)


class Overwrites(WholePublisher):
    """Puts other files in the place of a release that is there."""

    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> Release:
        import shutil
        from urllib.parse import urlsplit

        target = Path(urlsplit(str(self.uri)).path) / name
        shutil.rmtree(target, ignore_errors=True)
        return super().publish(bundle, manifest, name)


class Engine(ServingEngine):
    """No bug."""

    stage: ClassVar[Stage] = Stage.REGISTER
    name: ClassVar[str] = "engine"
    paper: ClassVar[str] = "None."
    supported_versions: ClassVar[str] = ">=1,<2"

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        return {"engine.yaml": f"blocks: {plan.num_blocks}\n"}


class BrokenYaml(Engine):
    """Renders what YAML cannot read."""

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        return {"engine.yaml": "blocks: [1, 2\n"}


class EscapesFolder(Engine):
    """Writes beside its folder."""

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        return {"../engine.yaml": "blocks: 1\n"}


class TimeInFile(Engine):
    """Renders the time."""

    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        return {"engine.yaml": f"written: {time.time_ns()}\n"}


class NoVersions(Engine):
    """Its versions are no specifier."""

    supported_versions: ClassVar[str] = "1.x"


class Crashes(Engine):
    """Fails as a program on a budget that it should refuse."""

    def budget(self) -> dict[str, Any]:
        return {**super().budget(), "gpu_memory_gib": 24.0, "max_model_len": min(self.max_model_len, 2048)}


class Export(ExportFormat):
    """No bug."""

    stage: ClassVar[Stage] = Stage.REGISTER
    name: ClassVar[str] = "export"
    paper: ClassVar[str] = "None."

    def check(self, facts: ExportFacts) -> None:
        if facts.model.config["model_type"] != "llama":
            raise SpecError("only Llama")

    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        (folder / "tensors.txt").write_text("\n".join(model.tensors), encoding="utf-8")
        return {"tensors": len(model.tensors)}


class RefusesLlama(Export):
    """Fails as a program on a model that it could refuse."""

    def check(self, facts: ExportFacts) -> None:
        super().check(facts)
        raise KeyError("rope")


class WritesNothing(Export):
    """Leaves no file."""

    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        return {"tensors": len(model.tensors)}


class TimeInExport(Export):
    """Writes the time."""

    def write(
        self, model: Checkpoint, folder: Path, invariants: Mapping[str, Any], context: Context
    ) -> Mapping[str, float]:
        (folder / "tensors.txt").write_text(str(time.time_ns()), encoding="utf-8")
        return {}


class CarriesAnything(Export):
    """Knows every architecture, it says."""

    def check(self, facts: ExportFacts) -> None:
        return None


class NoSuchLibrary(Export):
    """Its bytes depend on what nobody has."""

    libraries: ClassVar[tuple[str, ...]] = ("no-such-distribution",)
