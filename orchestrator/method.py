"""The method kinds. A method *is* a frozen pydantic model: its fields are its parameters, its ClassVars its identity.

| kind            | stages                   | verb                                                     |
|-----------------|--------------------------|----------------------------------------------------------|
| `Calibrator`    | calibrate                | `sample(tokenizer, seed) -> CalibrationSet`              |
| `ModelMethod`   | prune, distill, quantize | `apply(model, context) -> ModelResult`                   |
| `Evaluator`     | validate                 | `measure(candidate, baseline, context) -> {name: number}`|
| `Publisher`     | register                 | `publish(bundle, manifest, name) -> Release`             |
| `ServingEngine` | register                 | in `orchestrator.serving_engine`                         |
| `CachePolicy`   | validate                 | in `orchestrator.cache_policy`                           |
| `LayerMethod`   | prune, quantize          | in `orchestrator.layer_method`, with its kinds           |
| `ExportFormat`  | register                 | in `orchestrator.export_format`                          |

State is passed in and returned, never hidden in the method. This module imports no torch, so that a
specification can be planned without it; method files import torch inside the functions that compute.

Shape legend: N = sequences, T = tokens of a sequence.
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

from orchestrator.bootstrap import Samples
from orchestrator.recalibration import Recalibration, Variant
from orchestrator.sources import CalibrationFiles, HeldOutFiles, InputFile, InputFolders, InputModels
from orchestrator.work import ModelFacts, Work

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.cache_policy import CachePolicy
    from orchestrator.calibration import CalibrationSet
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.scheme import QuantizedWeight
    from orchestrator.store import Release


class Stage(StrEnum):
    """The stages of a pipeline, in the order in which a specification usually names them."""

    CALIBRATE = "calibrate"
    PRUNE = "prune"
    DISTILL = "distill"
    QUANTIZE = "quantize"
    VALIDATE = "validate"
    REGISTER = "register"


class Invariant(StrEnum):
    """A property of a model artifact that later steps must keep."""

    ZEROS = "zeros"  # every weight that a pruning step set to zero stays zero
    GRID = "grid"  # weights lie on a quantization grid and are stored as packed integers
    KV_SCALES = "kv_scales"  # measured scales of an fp8 KV cache; they are those of the weights as they are


# What a stage gives its result, unless the method says otherwise.
PROVIDED_BY_STAGE: Mapping[Stage, frozenset[Invariant]] = {
    Stage.PRUNE: frozenset({Invariant.ZEROS}),
    Stage.QUANTIZE: frozenset({Invariant.GRID}),
}

# Where text comes from: a local .txt/.md/.py/.jsonl/.parquet file, or hub:OWNER/NAME[/CONFIG]:SPLIT@REVISION.
# In a specification a relative path is relative to the folder of the specification. The plan puts the
# content's sha256, not the path, into the fingerprint.
TextSource = Annotated[str, InputFile()]
# Texts by the name of the tier that each is: none may be one that the same specification calibrates or trains on. The
# plan refuses that by their content. Metrics of a tier are called METRIC.TIER.
TIER = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
TierName = Annotated[str, Field(pattern=TIER, max_length=60)]
HeldOutSources = Annotated[Mapping[TierName, Annotated[str, Field(min_length=1)]], HeldOutFiles()]
# Texts by name, on which an evaluator has the model calibrated again: each another one, and none that it measures on.
CalibrationSources = Annotated[Mapping[TierName, Annotated[str, Field(min_length=1)]], CalibrationFiles()]
# Folders by the name of the tier that each is; every file in them enters the fingerprint.
TierFolders = Annotated[Mapping[TierName, Annotated[str, Field(min_length=1)]], InputFolders()]
# Models with a weight each: a local folder, a hub id, or `DENSE` for the model that the pipeline started from. The plan
# resolves them, and puts the digests of their files into the fingerprint.
DENSE = "dense"
WeightedModels = Annotated[Mapping[str, Annotated[float, Field(gt=0)]], InputModels()]


TRAINED_TOKENS = 1 << 22  # of a text that was trained on, so many are kept with the model: 16 MiB


@dataclass(frozen=True)
class ModelResult:
    """What a `ModelMethod` returns: the changed model and numbers worth recording.

    blocks: which decoder blocks of the input are left, in their order, if some were removed: ``(0, 1, 3)``.
    encodings: by name, the linear layers that are stored on a grid. A method that keeps `Invariant.GRID` and gives none
        has changed no quantized layer: those that are left are stored as the input has them.
    kv_scales: by name of the attention module ("model.layers.0.self_attn"), the scales of its keys and of its values in
        an fp8 cache. A method that keeps `Invariant.KV_SCALES` and gives none leaves them as they are.
    curves: by name, (update, value) in the order of the updates; they become metrics with a history in MLflow.
    trained_on: token windows [N, T] of a text other than the calibration set that the method trained on: what measures
        the model later looks whether its own texts are among them.
    """

    model: PreTrainedModel
    metrics: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[int, ...] | None = None
    encodings: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    kv_scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    trained_on: torch.Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What an `Evaluator` returns that has more to say than numbers.

    curves: by name, (place, value) in rising order of the places; they become metrics with a history in MLflow.
    samples: what metrics follow from, unit by unit; gates and reports take their intervals from them.
    """

    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    samples: Sequence[Samples] = ()


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
    checkpoint: the model that the step reads, as it is stored; None where a step has none of its own.
    held: the invariants of that model.
    state: of a `ModelMethod` that is `resumable`, a folder that outlives a killed run, until the step has its result.
    cache: a folder that steps and runs share, for what is dear to compute; what it holds may be gone at any time.
    policy: how keys and values are kept, of an `Evaluator` that `takes_policy`; None where the step names none.
    variants: the `recalibrations` of an `Evaluator`, in their order.
    trained_on: of an `Evaluator`, what the steps that made the model trained on, each at most `TRAINED_TOKENS` long.
    """

    seed: int
    dense: Checkpoint
    calibration: CalibrationSet | None
    scratch: Path
    progress: Callable[[float, str], None] = _ignore_progress
    checkpoint: Checkpoint | None = None
    held: frozenset[Invariant] = frozenset()
    state: Path | None = None
    cache: Path | None = None
    policy: CachePolicy | None = None
    variants: tuple[Variant, ...] = ()
    trained_on: tuple[CalibrationSet, ...] = ()


class Method(BaseModel):
    """Base of all kinds.

    stage, name: what a specification writes as ``stage: name``. `paper` is the source: an arXiv number with
    equation, or one sentence for what has no paper. `keeps` lists the invariants of its input that survive the
    method; an undeclared one counts as destroyed, and `plan` refuses the chain. `requires` lists those that its input
    must have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stage: ClassVar[Stage]
    name: ClassVar[str]
    paper: ClassVar[str]
    keeps: ClassVar[frozenset[Invariant]] = frozenset()
    provides: ClassVar[frozenset[Invariant]] = frozenset()
    requires: ClassVar[frozenset[Invariant]] = frozenset()

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


class ModelMethod(Method):
    """Changes a whole model, for instance by training it.

    resumable: whether a killed step goes on from what it has put into `Context.state`.
    """

    resumable: ClassVar[bool] = False

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

    def economies(self) -> Sequence[Mapping[str, Any]]:
        """Return changes of parameters that save memory, the least costly first; offered when a step does not fit.

        Each is tried by itself, with `estimate`, then all together.
        """
        return ()

    def prepare(self, context: Context) -> None:
        """Do what needs memory before the model is loaded, for instance run a teacher, and put it into the cache."""

    @abstractmethod
    def apply(self, model: PreTrainedModel, context: Context) -> ModelResult:
        """Return the changed model. `model` is this step's own copy and may be changed in place."""


class Evaluator(Method):
    """Measures a compressed model beside the dense one.

    `metrics` says what is measured: name -> meaning with unit; where the names depend on parameters, `declared` does.
    A gate can only refer to these names. ``dense_NAME`` is the same of the dense model, ``NAME_ratio`` is compressed /
    dense, and ``NAME.TIER`` is the metric NAME of one text, task or batch.
    better: by metric (without tier), which way is better; bounds relative to the dense model need it.
    quality: whether this is about how well the model does its work, and not about what it costs.
    sampled: metrics (without tier) that `measure` gives samples of, so that a gate can ask for confidence.
    right_or_wrong: those of them of which each unit has one answer, right or wrong; they are held by exact tests.
    takes_policy: whether the step may name a `CachePolicy`, found in `Context.policy`.
    """

    metrics: ClassVar[Mapping[str, str]]
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {}
    quality: ClassVar[bool] = True
    sampled: ClassVar[frozenset[str]] = frozenset()
    right_or_wrong: ClassVar[frozenset[str]] = frozenset()
    takes_policy: ClassVar[bool] = False

    def declared(self) -> Mapping[str, str]:
        """What is measured with these parameters: name -> meaning with unit."""
        return self.metrics

    def check_model(self, model: Checkpoint, policy: CachePolicy | None) -> None:
        """Refuse, while planning, a model that `measure` would refuse, as far as config and tensors show.

        model: as the step will read it. Raises `OrchestratorError`.
        """

    def reads_calibration(self) -> bool:
        """Whether, with these parameters, the calibration set is looked at, if a step before made one."""
        return False

    def presupposed(self) -> Mapping[str, tuple[float, str]]:
        """Return, by metric, the largest value with which bounds on the others mean anything, and what to do about a
        larger one. Held as soon as there are bounds; for instance how much of a text was trained on."""
        return {}

    def recalibrations(self) -> Sequence[Recalibration]:
        """Return other calibrations that the model is to be made with; `measure` finds them in `Context.variants`.

        Their fingerprints become part of the step's. What making them takes is added to `estimate`.
        """
        return ()

    def most_units(self) -> int | None:
        """The most units that samples of one metric can have with these parameters; None where that is not known."""
        return None

    def expected_units(self) -> int:
        """About how many units `measure` gives samples of; the size of the report follows from it."""
        return 0

    def estimate(self, model: ModelFacts, dense: ModelFacts, calibration: tuple[int, int]) -> Work:
        """Both models in memory, in float32, and some thousand tokens through each."""
        passed = dense.forward(8192, 512, 512, head=True).times(2)
        held = dense.float32_bytes + model.load_bytes(as_float32=True)
        return Work(memory_bytes=held + 8 * 512 * dense.vocabulary).then(passed)

    @abstractmethod
    def measure(self, candidate: Checkpoint, baseline: Checkpoint, context: Context) -> Mapping[str, float] | Measured:
        """Return a finite number for every name in `declared`; within `Measured`, curves and samples beside them."""


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
        if alias in ("staging", "production"):
            raise ValueError("registering makes a 'candidate'; `orchestrator promote` takes it further")
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
