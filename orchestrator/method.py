"""The method kinds. A method *is* a frozen pydantic model: its fields are its parameters, its ClassVars its identity.

| kind            | stages          | verb                                                     |
|-----------------|-----------------|----------------------------------------------------------|
| `Calibrator`    | calibrate       | `sample(tokenizer, seed) -> CalibrationSet`              |
| `LayerMethod`   | prune, quantize | `compress(weight_OI, statistic) -> LayerResult` (pure)   |
| `ScalingMethod` | prune, quantize | the same, and `input_scale(weights, statistic) -> s [I]` |
| `ModelMethod`   | prune, distill, quantize | `apply(model, context) -> ModelResult`          |
| `Evaluator`     | validate        | `measure(candidate, baseline, context) -> {name: number}`|
| `Publisher`     | register        | `publish(bundle, manifest, name) -> Release`             |
| `ServingEngine` | register        | `render(shape, plan) -> {file name: text}`               |
| `ExportFormat`  | register        | in `orchestrator.export_format`                          |

State is passed in and returned, never hidden in the method. This module imports no torch, so that a
specification can be planned without it; method files import torch inside the functions that compute.

Shape legend: O = out features, I = in features, G = groups along I, N = sequences, T = tokens of a sequence.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from orchestrator.scheme import QuantizedWeight, QuantScheme
from orchestrator.serving import KVPlan, ModelShape
from orchestrator.sources import InputFile
from orchestrator.work import FLOAT32, ModelFacts, Work

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.calibration import CalibrationSet
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.statistics import InputMoment
    from orchestrator.store import Release


class Stage(StrEnum):
    """The stages of a pipeline, in the order in which a specification usually names them."""

    CALIBRATE = "calibrate"
    PRUNE = "prune"
    DISTILL = "distill"
    QUANTIZE = "quantize"
    VALIDATE = "validate"
    REGISTER = "register"


class Needs(StrEnum):
    """What a `LayerMethod` must know about a layer's inputs. The walk collects no more than that."""

    WEIGHT = "weight"  # nothing: the weight alone
    INPUT_NORM = "input norm"  # the first-order record: n, sum x, sum |x|, max |x|, sum x^2
    INPUT_MOMENT = "input moment"  # the same and H = X^T X


# What a method's blocks are calibrated on: the inputs that the compressed blocks before them produce, or those of the
# model as it enters the step (then statistics are shared by all methods and candidates).
InputMode = Literal["propagated", "dense"]


class Invariant(StrEnum):
    """A property of a model artifact that later steps must keep."""

    ZEROS = "zeros"  # every weight that a pruning step set to zero stays zero
    GRID = "grid"  # weights lie on a quantization grid and are stored as packed integers


# What a stage gives its result, unless the method says otherwise.
PROVIDED_BY_STAGE: Mapping[Stage, frozenset[Invariant]] = {
    Stage.PRUNE: frozenset({Invariant.ZEROS}),
    Stage.QUANTIZE: frozenset({Invariant.GRID}),
}

# Where text comes from: a local .txt/.md/.py/.jsonl/.parquet file, or hub:OWNER/NAME[/CONFIG]:SPLIT@REVISION.
# In a specification a relative path is relative to the folder of the specification. The plan puts the
# content's sha256, not the path, into the fingerprint.
TextSource = Annotated[str, InputFile()]


@dataclass(frozen=True)
class LayerShape:
    """A linear layer as the plan sees it, before any weight is read."""

    name: str  # e.g. model.layers.0.mlp.up_proj
    out_features: int
    in_features: int


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


@dataclass(frozen=True)
class ModelResult:
    """What a `ModelMethod` returns: the changed model and numbers worth recording.

    blocks: which decoder blocks of the input are left, in their order, if some were removed: ``(0, 1, 3)``.
    """

    model: PreTrainedModel
    metrics: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[int, ...] | None = None


def _ignore_progress(fraction: float, message: str) -> None:
    """The default of `Context.progress`."""


@dataclass(frozen=True)
class Context:
    """What a step may know beside its input.

    seed: of the specification; the only source of randomness.
    dense: the uncompressed model that the pipeline started from: teacher and baseline.
    calibration: the most recent calibration set, or None if no step before made one.
    scratch: an empty folder that is removed after the step.
    progress: call with (fraction in [0, 1], short message).
    """

    seed: int
    dense: Checkpoint
    calibration: CalibrationSet | None
    scratch: Path
    progress: Callable[[float, str], None] = _ignore_progress


class Method(BaseModel):
    """Base of all kinds.

    stage, name: what a specification writes as ``stage: name``. `paper` is the source: an arXiv number with
    equation, or one sentence for what has no paper. `keeps` lists the invariants of its input that survive the
    method; an undeclared one counts as destroyed, and `plan` refuses the chain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stage: ClassVar[Stage]
    name: ClassVar[str]
    paper: ClassVar[str]
    keeps: ClassVar[frozenset[Invariant]] = frozenset()
    provides: ClassVar[frozenset[Invariant]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "stage" in cls.__dict__ and "provides" not in cls.__dict__:
            cls.provides = PROVIDED_BY_STAGE.get(cls.stage, frozenset())

    def preflight(self) -> None:
        """Check what can be checked before any compute (files, services). Raise `OrchestratorError` if unusable."""

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """What a step of this method takes, from sizes alone, for `plan`; nothing of the result depends on it.

        model: the step's input. dense: the uncompressed model. calibration: sequences and tokens of each, of the
        latest set. The kinds have rough defaults; a `LayerMethod` is asked for `working_bytes` and `effort` instead.
        """
        return Work()


class Calibrator(Method):
    """Draws the token windows that statistics are collected on."""

    def expected_shape(self) -> tuple[int, int] | None:
        """The number of sequences and of tokens of each that `sample` will return, as far as that is known."""
        return None

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Tokenizing some times the text that is drawn, a piece at a time: some hundred bytes a token of the piece."""
        tokens = calibration[0] * calibration[1]
        return Work(memory_bytes=(40 << 20) + 24 * tokens, disk_bytes=8 * tokens + 500, moved_bytes=2000.0 * tokens)

    @abstractmethod
    def sample(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> CalibrationSet:
        """Return token ids [N, T]. Raise `StepError` if the source holds too little text."""


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


class ModelMethod(Method):
    """Changes a whole model, for instance by training it."""

    def needs_calibration(self) -> bool:
        """Whether, with these parameters, a calibration set must come before this step."""
        return False

    def blocks_removed(self) -> int:
        """How many decoder blocks the result has fewer than the input; planning checks and estimates with it."""
        return 0

    def config_after(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config.json of the result from that of the input, but for the blocks that go.

        Called while planning, without torch: later steps are held against the shapes that follow from it. Default: the
        same. Raises `StepError` for a model that `apply` would refuse, as far as its configuration shows.
        """
        return config

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse, before any step, a model that `apply` would refuse, as far as its modules show. Raises `StepError`.

        model: as Transformers makes it from config.json, its parameters on the meta device. `plan` calls this in a
        process of its own.
        """

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """One pass of the calibration set through both models, held in float32."""
        tokens = calibration[0] * calibration[1]
        passed = model.forward(tokens, calibration[1], calibration[1], head=True).times(2)
        held = model.load_bytes(as_float32=True) + dense.float32_bytes
        return Work(memory_bytes=held + model.activation_bytes(calibration[1], calibration[1])).then(passed)

    @abstractmethod
    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Return the changed model. `model` is this step's own copy and may be changed in place."""


class Evaluator(Method):
    """Measures a compressed model beside the dense one.

    `metrics` says what is measured: name -> meaning with unit. A gate can only refer to these names.
    """

    metrics: ClassVar[Mapping[str, str]]

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Both models in memory, in float32, and some thousand tokens through each."""
        passed = dense.forward(8192, 512, 512, head=True).times(2)
        held = dense.float32_bytes + model.load_bytes(as_float32=True)
        return Work(memory_bytes=held + 8 * 512 * dense.vocabulary).then(passed)

    @abstractmethod
    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float]:
        """Return a finite number for every name in `metrics`."""


class Publisher(Method):
    """Puts a finished release where it will be served from."""

    uri: str | None = Field(
        None,
        description="Root to publish below: s3://BUCKET/PREFIX, file:///FOLDER or a path. Default: 'releases' in "
        "the home folder.",
    )
    alias: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Alias that the model registry sets on the new version, e.g. 'candidate'.",
    )

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str | None) -> str | None:
        if alias is not None and (alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias)):
            raise ValueError("the model registry reserves 'latest' and 'v1', 'v2', ...")
        return alias

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Reading, hashing and writing the files of the model."""
        stored = model.stored_bytes + model.rest_bytes
        return Work(disk_bytes=2000, moved_bytes=12.0 * stored, scratch_bytes=stored)

    @abstractmethod
    def publish(self, bundle: Path, manifest: Mapping[str, Any], name: str) -> Release:
        """Publish every file of `bundle` under `name`, completely or not at all. Raise `PublishError`."""

    @abstractmethod
    def find(self, name: str) -> Release | None:
        """Return the complete release called `name`, or None. Raise `PublishError` if it is damaged."""


class ServingEngine(Method):
    """Writes the files with which one engine serves the compressed model with a planned KV cache.

    The fields below are common to all engines; an engine adds its own.
    """

    supported_versions: ClassVar[str]  # a specifier, e.g. ">=0.30,<0.34"

    gpu_memory_gib: float = Field(24.0, gt=0, le=100_000, description="Memory of one accelerator, GiB.")
    memory_utilization: float = Field(0.92, gt=0, le=1, description="Share of that memory the engine may use.")
    max_model_len: int = Field(2048, gt=0, description="Longest sequence served: prompt and answer, tokens.")
    kv_cache_dtype: str = Field("auto", description="Element type of the KV cache; 'auto' is the model's own.")
    block_size: int = Field(16, gt=0, description="Tokens per KV-cache block.")
    activation_gib: float = Field(1.0, ge=0, le=100_000, description="Memory left to activations and graphs, GiB.")

    def budget(self) -> dict[str, Any]:
        """The fields above by name: the arguments of `orchestrator.serving.plan_kv`."""
        return {name: getattr(self, name) for name in ServingEngine.model_fields}

    @abstractmethod
    def render(self, shape: ModelShape, plan: KVPlan) -> Mapping[str, str]:
        """Return {file name: content}. Raise `SpecError` for what this engine cannot honour."""
