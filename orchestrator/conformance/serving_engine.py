"""Checks for a `ServingEngine`: what it renders for the tiny model, and what it refuses."""

from __future__ import annotations

import ast
import json
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import ValidationError

from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.errors import OrchestratorError
from orchestrator.serving import ModelShape
from orchestrator.serving_engine import ServingEngine

OWN_FILES = ("kv-plan.json", "README.md")  # what the core itself writes beside the engine's files
_PARSERS: Mapping[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".toml": tomllib.loads,
    ".py": ast.parse,
    ".sh": lambda text: shlex.split(text, comments=True),
}
# Budgets that nothing can honour.
_ABSURD: tuple[dict[str, Any], ...] = (
    {"gpu_memory_gib": 1e-6},
    {"max_model_len": 10**12},
    {"kv_cache_dtype": "no_such_dtype"},
)


def check_serving_engine(method: ServingEngine, laboratory: Laboratory, findings: Findings) -> None:
    """The checks V1 to V4 and C7."""
    try:
        known = bool(str(SpecifierSet(method.supported_versions)))
    except (InvalidSpecifier, AttributeError, TypeError):
        known = False
    findings.expect(
        "V4 versions", known, 'ClassVar supported_versions must name the engine\'s versions, e.g. ">=0.30,<0.34"'
    )
    rendered = []
    for seed in (0, 1):
        with findings.attempt("V1 renders", "`render` for a Llama"), left_alone(findings, "`render`", seed=seed):
            rendered.append(_render(method, laboratory))
    if len(rendered) < 2:
        return
    first, second = rendered
    findings.expect("V1 renders", first == second, "`render` gave two results for one plan; leave out time and chance")
    if findings.expect("V2 files", isinstance(first, Mapping) and bool(first), "`render` returned no {name: text}"):
        for name, text in first.items():
            _check_file(name, text, findings)
    for absurd in _ABSURD:
        _check_refuses(method, absurd, laboratory, findings)


def _render(method: ServingEngine, laboratory: Laboratory) -> Mapping[str, str]:
    shape = ModelShape.from_config(laboratory.dense.config)
    return method.render(shape, method.plan(shape, laboratory.dense.weight_bytes()))


def _check_file(name: object, text: object, findings: Findings) -> None:
    if not findings.expect(
        "V2 files",
        isinstance(name, str) and Path(name).name == name and name not in OWN_FILES,
        f"{name!r} is no plain file name, or is the core's own; files go into the engine's own folder",
    ):
        return
    if not findings.expect(
        "V2 files", isinstance(text, str) and bool(text.strip()), f"{name} is not text, or is empty; leave it out"
    ):
        return
    parse = _PARSERS.get(Path(str(name)).suffix)
    if parse:
        with findings.attempt("V2 files", f"parsing {name}"):
            parse(str(text))


def _check_refuses(
    method: ServingEngine, absurd: Mapping[str, Any], laboratory: Laboratory, findings: Findings
) -> None:
    shown = ", ".join(f"{name}={value!r}" for name, value in absurd.items())
    try:
        method = type(method).model_validate({**method.model_dump(), **absurd})
    except ValidationError:
        return  # the engine narrows the parameter: refused even earlier
    try:
        _render(method, laboratory)
    except OrchestratorError:
        return
    except Exception as error:  # whatever it is, it would reach the user as a fault of the program
        what = f"{shown} raised {type(error).__name__}: {error}; raise SpecError or PreflightError"
        findings.fail("V3 refuses", what)
    else:
        findings.fail("V3 refuses", f"{shown} is accepted; raise SpecError in `render` for what cannot be honoured")
