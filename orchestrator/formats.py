"""What a step lists beside its method: finding it, and for file formats, calling them.

A format's files lie in ``formats/<format>/`` of the release, as an engine's in ``serving/<engine>/``: no format can
meet a file of the model or of another. They are written into the bundle before anything is published, so that a format
that fails leaves no release behind.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.cache_policy import CachePolicy
from orchestrator.checkpoint import Checkpoint
from orchestrator.checks import Note
from orchestrator.errors import SpecError, StepError
from orchestrator.export_format import ExportFormat
from orchestrator.method import Context, Method, Stage
from orchestrator.plugins import InstalledMethod, Methods
from orchestrator.serving_engine import ServingEngine
from orchestrator.spec import Location

FOLDER = "formats"
_WORDS: Mapping[type[Method], str] = {ServingEngine: "serving engine", ExportFormat: "file format"}
Build = Callable[[InstalledMethod, Mapping[str, Any], Location], Method | None]


def listed_methods(
    entries: Sequence[Mapping[str, Mapping[str, Any] | None]],
    location: Location,
    kind: type[Method],
    methods: Methods,
    build: Build,
    note: Note,
) -> list[tuple[InstalledMethod, Any]]:
    """Return the methods of `kind` that entries ``{name: parameters}`` name; those that fail are noted and left out."""
    listed: list[tuple[InstalledMethod, Method]] = []
    for index, entry in enumerate(entries):
        for name, values in entry.items():
            place = (*location, index, name)
            try:
                found = methods.find(Stage.REGISTER, name)
                if not issubclass(found.cls, kind):
                    raise SpecError(f'"{name}" is no {_WORDS[kind]}')
            except SpecError as error:
                note(error, place)
                continue
            if any(name == other.name for _, other in listed):
                word = _WORDS[kind].rpartition(" ")[2]
                note(SpecError(f'the {word} "{name}" is listed twice', remedy="use one register step for each"), place)
            method = build(found, values or {}, place)
            if isinstance(method, kind):
                listed.append((found, method))
    return listed


def chosen_policy(
    entry: Mapping[str, Mapping[str, Any] | None] | None,
    location: Location,
    methods: Methods,
    build: Build,
    note: Note,
) -> tuple[InstalledMethod, CachePolicy] | None:
    """Return the cache policy that ``{name: parameters}`` names; None if there is none, or it fails and is noted."""
    for name, values in (entry or {}).items():
        place = (*location, name)
        try:
            found = methods.find(Stage.VALIDATE, name)
            if not issubclass(found.cls, CachePolicy):
                raise SpecError(f'"{name}" is no cache policy')
        except SpecError as error:
            note(error, place)
            return None
        policy = build(found, values or {}, place)
        return (found, policy) if isinstance(policy, CachePolicy) else None
    return None


def format_identity(export: ExportFormat) -> dict[str, Any]:
    """What of a format decides its bytes, apart from its plugin's sources."""
    versions = {}
    for name in export.libraries:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"  # refused by the format's preflight, unless it can do without
    return {"name": export.name, "parameters": export.model_dump(mode="json"), "libraries": versions}


def write_formats(
    formats: Sequence[ExportFormat],
    model: Checkpoint,
    bundle: Path,
    invariants: Mapping[str, Any],
    context: Context,
) -> dict[str, float]:
    """Let every format write into its folder of `bundle`; return what was measured, as ``<format>_<name>``.

    Raises `StepError` for a format that leaves no file, or something else than plain files.
    """
    measured: dict[str, float] = {}
    for index, export in enumerate(formats):
        folder, scratch = bundle / FOLDER / export.name, context.scratch / FOLDER / export.name
        for path in (folder, scratch):
            path.mkdir(parents=True)
        first, share = 0.2 * index / len(formats), 0.2 / len(formats)

        def progress(done: float, message: str, first: float = first, share: float = share) -> None:
            context.progress(first + share * done, message)

        numbers = export.write(model, folder, invariants, replace(context, scratch=scratch, progress=progress))
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        if not files or not all(path.is_file() and not path.is_symlink() for path in files):
            raise StepError(f"the format {export.name!r} left {len(files)} files, or something that is no plain file")
        measured |= {f"{export.name}_{name}": value for name, value in numbers.items()}
    return measured
