"""The specification: YAML to a pydantic model, with every error at its line. Imports no torch.

The core owns the keys beside `with`; the method owns those inside it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import Problem, SpecError
from orchestrator.foreign import read_plain
from orchestrator.method import Stage
from orchestrator.yaml_text import Location as Location
from orchestrator.yaml_text import dotted, parse

MAX_BYTES = 1 << 17  # of a specification; PyYAML takes some 20 s for a MiB
M = TypeVar("M", bound=BaseModel)
_MOST_UNKNOWN = 5  # keys of one mapping that are quoted: any file can be named as a specification, by others in Prefect
_LIKE_A_KEY = re.compile(r"[\w./*-]{1,40}")


class ModelSpec(BaseModel):
    """The model to compress."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1, description="A local folder (relative to the specification) or a hub id.")
    revision: str = Field("main", min_length=1, description="Revision of a hub id: branch, tag or commit.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype to load and store plain weights in; 'auto' is the stored one."
    )
    trust_remote_code: bool = Field(False, description="Run the code (*.py) in the folder of the model. Read it first.")


class Bound(BaseModel):
    """What a metric must satisfy before anything is registered."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min: float | None = Field(None, description="Smallest value allowed.")
    max: float | None = Field(None, description="Largest value allowed.")
    retain: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the dense model's value to be kept: compressed / dense, or dense / compressed where "
        "lower is better.",
    )
    confidence: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Hold the bounds against the worse end of the interval of this confidence, not the value itself.",
    )

    @model_validator(mode="after")
    def _some_bound(self) -> Bound:
        if self.min is None and self.max is None and self.retain is None:
            raise ValueError("give min, max or retain")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class StepSpec(BaseModel):
    """One step: exactly one stage key, whose value is the method's name."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=False)

    calibrate: str | None = None
    prune: str | None = None
    distill: str | None = None
    quantize: str | None = None
    validate_: str | None = Field(None, alias="validate")
    register_: str | None = Field(None, alias="register")
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    skip: tuple[str, ...] = ()
    inputs: Literal["dense", "propagated"] | None = Field(
        None,
        description="What blocks are calibrated on: the inputs of the model as it enters the step, shared by all "
        "candidates, or those that the compressed blocks before produce. Default: the method's choice.",
    )
    require: dict[str, Bound] = Field(default_factory=dict)
    must_not_fall: tuple[str, ...] = Field(
        (), description="Metrics that must not be worse than the dense model's beyond chance (95 % interval)."
    )
    engines: tuple[dict[str, dict[str, Any] | None], ...] = ()
    formats: tuple[dict[str, dict[str, Any] | None], ...] = ()
    policy: dict[str, dict[str, Any] | None] | None = None

    @model_validator(mode="after")
    def _one_stage(self) -> StepSpec:
        named = [stage.value for stage in Stage if self._value(stage) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none"
            raise ValueError(f"a step names exactly one stage ({', '.join(Stage)}); found {found}")
        for key, entries in (("engines", self.engines), ("formats", self.formats)):
            if any(len(entry) != 1 for entry in entries):
                raise ValueError(f"each entry of {key} is one {key[:-1]}'s name with its parameters")
        if self.policy is not None and len(self.policy) != 1:
            raise ValueError("policy is one cache policy's name with its parameters")
        return self

    def _value(self, stage: Stage) -> str | None:
        attribute = stage.value + ("_" if stage in (Stage.VALIDATE, Stage.REGISTER) else "")
        value = getattr(self, attribute)
        return None if value is None else str(value)

    @property
    def stage(self) -> Stage:
        """The stage that this step names."""
        return next(stage for stage in Stage if self._value(stage) is not None)

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self._value(self.stage))


class PipelineSpec(BaseModel):
    """A whole specification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Name of pipeline and released model.")
    model: ModelSpec
    seed: int = Field(0, ge=0, lt=2**63, description="The only source of randomness.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where layer methods and their statistics are computed.")
    max_memory_gib: float | None = Field(
        None,
        gt=0,
        le=100_000,
        allow_inf_nan=False,
        description="Memory that a prune or quantize step may use beside the interpreter and its libraries, GiB; "
        "fewer layers and batches are then worked on at once, and what cannot fit is refused. Default: "
        "ORCHESTRATOR_MAX_MEMORY_GIB, or no limit.",
    )
    steps: tuple[StepSpec, ...] = Field(min_length=1)


@dataclass(frozen=True)
class SpecText:
    """Where each value of a specification stands."""

    path: Path
    lines: Mapping[Location, int]

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the specification are relative to."""
        return self.path.parent

    def place(self, location: Location) -> str:
        """Return "file:line: steps[1].prune" for a location, falling back to the nearest enclosing line."""
        return _place(self.path, self.lines, location)

    def problems(self, error: ValidationError, prefix: Location, known: Iterable[str]) -> list[Problem]:
        """Turn what pydantic found below `prefix` into problems with places and remedies."""
        return _problems(self.path, self.lines, error, prefix, lambda _: known)

    def line_of(self, problem: Problem) -> int:
        """The line that a problem stands at; 0 for one outside this file. Problems are shown in this order."""
        match = re.match(r":(\d+)", (problem.where or "").removeprefix(str(self.path)))
        return int(match[1]) if match else 0


@dataclass(frozen=True)
class SpecFile(SpecText):
    """A valid specification."""

    spec: PipelineSpec


@dataclass(frozen=True)
class SpecParts(SpecText):
    """What is valid of a specification, so that planning can check it, and everything that is wrong.

    spec: all of it, or None if anything is wrong. steps: the valid ones, by their index.
    """

    spec: PipelineSpec | None
    model: ModelSpec | None
    steps: Mapping[int, StepSpec]
    faults: tuple[Problem, ...]

    def whole(self) -> SpecFile:
        """Return the specification. Raises `SpecError` with all faults if there are any."""
        if self.spec is None or self.faults:
            raise SpecError(sorted(self.faults, key=self.line_of))
        return SpecFile(self.path, self.lines, self.spec)


def load_spec(path: Path) -> SpecFile:
    """Read and validate a specification. Raises `SpecError` with all problems at once."""
    return read_spec(path).whole()


def read_spec(path: Path) -> SpecParts:
    """Read what is valid of a specification. Raises `SpecError` only if it is no YAML mapping at all."""
    path = Path(path)
    data, lines, faults = _read_yaml(path)
    try:
        spec = validate_strictly(PipelineSpec, data)
    except ValidationError as error:
        found = _problems(path, lines, error, (), _known_core_keys)
    else:
        return SpecParts(path, lines, spec, spec.model, dict(enumerate(spec.steps)), tuple(faults))
    steps = {}
    for index, value in enumerate(data["steps"] if isinstance(data.get("steps"), list) else ()):
        step = _valid_or_none(StepSpec, value) or _valid_or_none(StepSpec, _without_faults(value))
        if step is not None:
            steps[index] = step
    return SpecParts(path, lines, None, _valid_or_none(ModelSpec, data.get("model")), steps, (*faults, *found))


def _valid_or_none(cls: type[M], data: Any) -> M | None:
    """Validate a part whose faults are already known from validating the whole."""
    try:
        return validate_strictly(cls, data) if isinstance(data, dict) else None
    except ValidationError:
        return None


def _without_faults(step: Any) -> Any:
    """The step without the keys that are wrong, so that its method and the others can still be checked."""
    try:
        validate_strictly(StepSpec, step)
    except (ValidationError, TypeError) as error:
        wrong = (
            {item["loc"][0] for item in error.errors() if item["loc"]} if isinstance(error, ValidationError) else set()
        )
        return {key: value for key, value in step.items() if key not in wrong} if isinstance(step, dict) else None
    return step


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int], list[Problem]]:
    """Return the mapping with text as keys only, the line of every value, and what is wrong with its keys."""
    try:
        text = read_plain(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        place = f"{path}" if path.is_absolute() else f"{path}, that is {path.absolute()}"
        raise SpecError(f"there is no specification {place}", remedy="give the path of a YAML file") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}", remedy="give a YAML file in UTF-8") from None
    try:
        data, lines, faults = parse(text, path, "specification")
        _as_json(data)  # refuses here what no JSON can say: integers of thousands of digits
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SpecError(f"not valid YAML: {error.problem or error.context}", where=f"{path}:{line}") from None
    except RecursionError:
        raise SpecError("not valid YAML: it is nested too deeply", where=str(path)) from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # PyYAML's own, on odd tags
        raise SpecError(f"not valid YAML: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise SpecError("a specification is a mapping with version, name, model and steps", where=f"{path}:1")
    return data, lines, faults


def validate_strictly(cls: type[M], data: Mapping[str, Any]) -> M:
    """Validate as JSON in strict mode: "4" is not 4, true is not 1.0, a list is a tuple."""
    return cls.model_validate_json(_as_json(data), strict=True)


def _as_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, default=str)  # YAML dates become text; NaN is refused by the models


def _place(path: Path, lines: Mapping[Location, int], location: Location) -> str:
    """Where a value or a key stands; what does not look like a key is not quoted."""
    known = location
    while known and known not in lines:
        known = known[:-1]
    if location and isinstance(location[-1], str) and not _LIKE_A_KEY.fullmatch(location[-1]):
        location = (*location[:-1], "…")
    return f"{path}:{lines.get(known, 1)}" + (f": {dotted(location)}" if location else "")


def _known_core_keys(location: Location) -> Iterable[str]:
    """The keys allowed in the mapping at `location`."""
    models: dict[int, type[BaseModel]] = {0: PipelineSpec}
    model: type[BaseModel] | None = models.get(len(location))
    if location[:1] == ("model",):
        model = ModelSpec
    elif location[:1] == ("steps",):
        model = Bound if "require" in location else StepSpec
    fields = model.model_fields.items() if model else ()
    return [info.alias or name for name, info in fields]


def _problems(
    path: Path,
    lines: Mapping[Location, int],
    error: ValidationError,
    prefix: Location,
    known: Any,
) -> list[Problem]:
    problems = []
    unknown: dict[Location, list[Location]] = defaultdict(list)
    for item in error.errors(include_url=False):
        location = (*prefix, *item["loc"])
        if location == ("steps",) and item["type"] == "too_short" and item["input"]:
            continue  # entries are there: what is wrong with each of them is said in its place
        message, remedy = item["msg"], None
        if item["type"] == "extra_forbidden":
            unknown[location[:-1]].append(location)
            if len(unknown[location[:-1]]) > _MOST_UNKNOWN:
                continue
            name = str(item["loc"][-1])
            allowed = sorted(known(tuple(item["loc"][:-1])))
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
            message = "there is no such key"
            remedy = f'did you mean "{near[0]}"?' if near else f"allowed here: {', '.join(allowed) or 'none'}"
        elif item["type"] == "missing":
            message, location_above = f"the key {item['loc'][-1]!r} is missing", (*prefix, *item["loc"][:-1])
            location = location_above
        else:
            message = message.removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            if item["type"] == "json_invalid":  # its input is the whole specification
                message = f"a text holds half a character: {message}"
            elif not isinstance(item["input"], Mapping | Sequence) or isinstance(item["input"], str):
                message += f", not {json.dumps(item['input'], default=str)}"
        problems.append(Problem(message, _place(path, lines, location), remedy))
    for left in (locations[_MOST_UNKNOWN:] for locations in unknown.values()):
        if left:
            problems.append(Problem(f"there are {len(left)} more unknown keys", f"{path}:{lines.get(left[0], 1)}"))
    return problems
