"""From the `with` mapping of a step to a method, and from a method to what of it enters a fingerprint.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from orchestrator.checkpoint import Checkpoint, expand_home, locate_model
from orchestrator.checks import Note, plugin_fault
from orchestrator.digests import FileDigests
from orchestrator.errors import OrchestratorError, PreflightError, SpecError
from orchestrator.method import DENSE, Method, Publisher
from orchestrator.plugins import InstalledMethod
from orchestrator.signing import SIGNING_KEY_VARIABLE
from orchestrator.sources import (
    PREFIX,
    InputFile,
    InputFolders,
    InputModels,
    check_folder,
    check_source,
    folder_digest,
    resolve_source,
    source_digest,
)
from orchestrator.spec import Location, SpecText, validate_strictly


def parameterize(
    file: SpecText,
    installed: InstalledMethod,
    values: Mapping[str, Any],
    location: Location,
    home: Path,
    note: Note,
) -> Method | None:
    """Build the method from its `with` mapping, paths made absolute."""
    values = dict(values)
    usable = True  # a fault is noted, and the rest is checked all the same
    for name in sorted(set(marked_fields(installed.cls, InputModels)) & set(values)):
        if isinstance(values[name], Mapping):
            try:
                values[name] = _resolved_models(values[name], file.folder)
            except OrchestratorError as error:
                note(error, (*location, name))
                usable = False
    for mark, check in ((InputFile, check_source), (InputFolders, check_folder)):
        for name in sorted(set(marked_fields(installed.cls, mark)) & set(values)):
            values[name], faults = _resolved(values[name], file.folder, check)
            for place, fault in faults:
                note(fault, (*location, name, *place))
                usable = False
    if issubclass(installed.cls, Publisher):
        uri = values.get("uri")
        if uri is None:
            values["uri"] = (home / "releases").absolute().as_uri()
        elif isinstance(uri, str) and "://" not in uri:
            try:
                values["uri"] = (file.folder / expand_home(uri)).absolute().as_uri()
            except PreflightError as error:
                note(error, (*location, "uri"))
                usable = False
        if "signing_key" in installed.cls.model_fields:
            key = values.get("signing_key", os.environ.get(SIGNING_KEY_VARIABLE) or None)
            values["signing_key"] = resolve_source(key, file.folder) if isinstance(key, str) else key
    try:
        with plugin_fault(installed, "__init__"):
            try:
                method = validate_strictly(installed.cls, values)
                return method if usable else None
            except ValidationError as error:
                raise SpecError(file.problems(error, location, list(installed.cls.model_fields))) from None
    except SpecError as error:
        note(error, location)
        return None


def _resolved(
    value: Any, folder: Path, check: Callable[[str], None]
) -> tuple[Any, list[tuple[tuple[str, ...], OrchestratorError]]]:
    """Return a path, or a mapping of names to paths, made absolute; and what is wrong with them, by place."""
    if isinstance(value, Mapping):
        parts = {name: _resolved(part, folder, check) for name, part in value.items() if isinstance(part, str)}
        faults = [((str(name), *place), error) for name, (_, found) in parts.items() for place, error in found]
        return {**value, **{name: part for name, (part, _) in parts.items()}}, faults
    if not isinstance(value, str):
        return value, []
    try:
        value = resolve_source(value, folder)
        check(value)
    except OrchestratorError as error:
        return value, [((), error)]
    return value, []


def _resolved_models(values: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
    """Return the mapping with the folder of every model that it names; one that is named twice is refused."""
    found: dict[Any, Any] = {}
    for name, weight in values.items():
        resolved = name
        if isinstance(name, str) and name != DENSE:
            model = locate_model(name, "main", folder)
            _ = (model.config, model.weight_files)  # refuses what cannot be a model
            resolved = str(model.path.absolute())
        if resolved in found:
            raise SpecError(f"{name!r} is named twice", remedy="name each model once, with the sum of its weights")
        found[resolved] = weight
    return found


def marked_fields(cls: type[Method], mark: type) -> Iterator[str]:
    """The fields whose annotation holds a `mark`."""
    for name, info in cls.model_fields.items():
        if _is_marked(info.metadata, mark) or _is_marked(get_args(info.annotation), mark):
            yield name


def _is_marked(parts: Iterable[Any], mark: type) -> bool:
    """Whether `mark` is among the parts of an annotation, or of one of its alternatives."""
    return any(isinstance(part, mark) or _is_marked(getattr(part, "__metadata__", ()), mark) for part in parts)


def parameters_of(installed: InstalledMethod, method: Method, digests: FileDigests) -> dict[str, Any]:
    """The parameters as they enter the fingerprint: text sources and models by content, not by path."""
    with plugin_fault(installed, "model_dump"):
        parameters = method.model_dump(mode="json")
    for name in marked_fields(type(method), InputModels):
        if parameters[name] is not None:
            named = parameters[name].items()  # a list, because two folders may hold the same bytes
            parameters[name] = sorted(
                [model if model == DENSE else Checkpoint(Path(model)).digest(digests.sha256), weight]
                for model, weight in named
            )

    def of_text(source: str) -> dict[str, str]:
        return {"sha256": source_digest(source) if source.startswith(PREFIX) else digests.sha256(Path(source))}

    def of_folder(folder: str) -> dict[str, str]:
        return {"sha256": folder_digest(folder)}

    for mark, digested in ((InputFile, of_text), (InputFolders, of_folder)):
        for name in marked_fields(type(method), mark):
            value = parameters[name]
            if isinstance(value, Mapping):
                parameters[name] = {key: digested(part) for key, part in value.items()}
            elif value is not None:
                parameters[name] = digested(value)
    return parameters
