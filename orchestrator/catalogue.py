"""`orchestrator methods`: what is installed, where it comes from, what it takes."""

from __future__ import annotations

import inspect
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from orchestrator.errors import SpecError
from orchestrator.method import Stage
from orchestrator.plan import LISTED
from orchestrator.plugins import InstalledMethod, Methods
from orchestrator.sources import HeldOutFiles, InputFile, InputFolders, InputModels


def as_document(methods: Methods, name: str | None = None) -> dict[str, Any]:
    """The catalogue, or the methods called `name`, as JSON."""
    chosen = _called(methods, name) if name else _ordered(methods)
    return {
        "methods": [_describe(method) for method in chosen],
        "broken": [
            {
                "plugin": broken.origin.plugin,
                "distribution": broken.origin.distribution,
                "version": broken.origin.version,
                "reason": broken.reason,
            }
            for broken in methods.broken
        ],
        "clashes": [
            {"stage": stage.value, "name": clash, "claimed_by": [str(owner.origin) for owner in owners]}
            for (stage, clash), owners in sorted(methods.clashes.items())
        ],
    }


def list_methods(methods: Methods) -> str:
    """One line for each method, then what is broken."""
    lines = [f"{'stage':<10} {'method':<14} {'distribution':<34} what it is"]
    for method in _ordered(methods):
        origin = f"{method.origin.distribution} {method.origin.version}"
        lines.append(f"{method.cls.stage:<10} {method.cls.name:<14} {origin:<34} {_summary(method)}")
    for broken in methods.broken:
        lines.append(f"broken     {broken.origin}: {broken.reason}")
    for (stage, name), owners in sorted(methods.clashes.items()):
        lines.append(f'clash      {stage} "{name}" is claimed by {" and ".join(str(owner.origin) for owner in owners)}')
    return "\n".join(lines)


def show_method(methods: Methods, name: str) -> str:
    """The methods called `name` with their parameters. Raises `SpecError` if there is none."""
    blocks = []
    for method in _called(methods, name):
        lines = [f"{method.cls.stage}: {name}   ({method.kind}, {method.origin})", f"  {_summary(method)}"]
        lines.append(f"  source: {method.cls.paper}")
        key = _listed_under(method)
        if key:
            lines.append(f"  no step of its own: it is listed under `{key}:` of a {method.cls.stage} step")
        for entry in _describe(method)["parameters"]:
            default = "required" if entry["required"] else f"default {entry['default']!r}"
            lines.append(f"  {entry['name']} ({entry['type']}, {default})")
            lines.append(f"      {entry['description']}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _ordered(methods: Methods) -> list[InstalledMethod]:
    """By stage: first what is a step, then what a step lists."""
    stages = list(Stage)
    return sorted(
        methods.installed.values(),
        key=lambda method: (stages.index(method.cls.stage), _listed_under(method) or "", method.cls.name),
    )


def _listed_under(method: InstalledMethod) -> str | None:
    """The key of a step that lists this method, if it is no step itself."""
    return next((key for kind, _, key in LISTED if issubclass(method.cls, kind)), None)


def _called(methods: Methods, name: str) -> list[InstalledMethod]:
    found = [method for method in _ordered(methods) if method.cls.name == name]
    if not found:
        known = ", ".join(sorted({known for _, known in methods.installed}))
        raise SpecError(f'no installed method is called "{name}"', remedy=f"installed: {known}")
    return found


def _summary(method: InstalledMethod) -> str:
    """First line of the class's own docstring, or of its module's."""
    text = method.cls.__dict__.get("__doc__") or getattr(inspect.getmodule(method.cls), "__doc__", None) or ""
    return text.strip().partition("\n")[0]


def _describe(method: InstalledMethod) -> dict[str, Any]:
    cls = method.cls
    return {
        "stage": cls.stage.value,
        "name": cls.name,
        "kind": method.kind,
        "paper": cls.paper,
        "summary": _summary(method),
        "distribution": method.origin.distribution,
        "version": method.origin.version,
        "parameters": [
            {
                "name": name,
                "type": _type_name(Annotated[info.annotation, *(info.metadata or [None])]),
                "required": info.is_required(),
                "default": None if info.is_required() else info.get_default(call_default_factory=True),
                "description": info.description,
            }
            for name, info in cls.model_fields.items()
        ],
    }


def _type_name(annotation: Any) -> str:
    """A type as a person writes it; what only validation needs is left out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        marked = any(isinstance(entry, InputFile) for entry in arguments[1:])
        for kind, shown in (
            (InputModels, "{model: weight}"),
            (HeldOutFiles, "{tier: text source}"),
            (InputFolders, "{tier: folder}"),
        ):
            if any(isinstance(part, kind) for part in arguments):
                return shown
        return "text source" if marked else _type_name(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(_type_name(part) for part in arguments)
    if origin is tuple and arguments[-1:] == (Ellipsis,):
        return f"list[{_type_name(arguments[0])}]"
    if annotation is NoneType:
        return "None"
    return (
        annotation.__name__
        if isinstance(annotation, type) and not arguments
        else str(annotation).replace("typing.", "")
    )
