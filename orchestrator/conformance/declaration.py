"""Checks for every kind: the class, its parameters, and what planning does with it in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.checkpoint import Checkpoint
from orchestrator.conformance.findings import Findings
from orchestrator.method import Method
from orchestrator.plugins import PluginError, check_class
from orchestrator.spec import validate_strictly

_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum", "const", "multipleOf")
_PROBE_SECONDS = 300  # a machine under heavy load takes long to start a process


def check_declaration(method: Method, findings: Findings) -> None:
    """The checks C1 to C5."""
    cls = type(method)
    try:
        check_class(cls)
    except PluginError as error:
        findings.fail("C1 complete", f"{error}; the plugin host would exclude the whole plugin for it")
    with findings.attempt("C2 bounded", "making the JSON schema of the parameters"):
        schema = cls.model_json_schema(mode="validation")
        for name in sorted(_unbounded(schema)):
            findings.fail(
                "C2 bounded",
                f"the parameter {name} takes any number; give its Field a bound (ge, gt, le or lt), so that nonsense "
                "is refused while planning",
            )
    _check_round_trip(method, findings)
    _check_frozen(method, findings)
    try:
        validate_strictly(cls, {**method.model_dump(mode="json"), "no_such_parameter": 1})
    except ValidationError:
        pass
    else:
        findings.fail("C5 closed", 'an unknown parameter is ignored; leave `extra="forbid"` of Method in place')


def _unbounded(schema: Mapping[str, Any]) -> Iterator[str]:
    definitions = schema.get("$defs", {})
    for name, entry in schema.get("properties", {}).items():
        if any(
            part.get("type") in ("integer", "number") and not any(bound in part for bound in _BOUNDS)
            for part in _parts(entry, definitions, frozenset())
        ):
            yield name


def _parts(entry: Any, definitions: Mapping[str, Any], seen: frozenset[str]) -> Iterator[Mapping[str, Any]]:
    """Every schema inside a schema, references followed once."""
    if isinstance(entry, list):
        for part in entry:
            yield from _parts(part, definitions, seen)
    elif isinstance(entry, Mapping):
        yield entry
        reference = str(entry.get("$ref", "")).rpartition("/")[2]
        if reference and reference not in seen:
            yield from _parts(definitions.get(reference, {}), definitions, seen | {reference})
        for key in ("anyOf", "allOf", "oneOf", "items", "prefixItems", "additionalProperties"):
            yield from _parts(entry.get(key), definitions, seen)
        for part in entry.get("properties", {}).values():
            yield from _parts(part, definitions, seen)


def _check_round_trip(method: Method, findings: Findings) -> None:
    with findings.attempt("C3 round trip", "writing the parameters as JSON and reading them back"):
        dumped = method.model_dump(mode="json")
        again = validate_strictly(type(method), json.loads(json.dumps(dumped, allow_nan=False)))
        findings.expect(
            "C3 round trip",
            again == method and again.model_dump(mode="json") == dumped,
            f"{dumped} read back gives {again!r}; use field types that JSON can carry, and validators that leave "
            "their own output as it is",
        )


def _check_frozen(method: Method, findings: Findings) -> None:
    cls = type(method)
    findings.expect(
        "C4 frozen",
        bool(cls.model_config.get("frozen")),
        "parameters can be changed after the method was made; leave `frozen=True` of Method in place",
    )
    private = sorted(cls.__private_attributes__)
    findings.expect(
        "C4 frozen",
        not private,
        f"the class keeps state in {', '.join(private)}; pass state in and return it, a method is only its parameters",
    )


class PlanningProbe:
    """Starts check C6 in a process of its own, so that it runs beside the other checks; `finish` takes the result."""

    def __init__(self, method: Method, model: Checkpoint) -> None:
        cls = type(method)
        request = {
            "module": cls.__module__,
            "class": cls.__qualname__,
            "parameters": method.model_dump(mode="json"),
            "model": str(model.path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.conformance.planning_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already; `finish` tells why
            self._process.stdin.write(json.dumps(request))
            self._process.stdin.close()
        self._process.stdin = None

    def finish(self, findings: Findings) -> None:
        """Wait for the process and note what it found."""
        try:
            stdout, stderr = self._process.communicate(timeout=_PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()
            findings.fail("C6 planning", f"planning with the method takes more than {_PROBE_SECONDS} s")
            return
        lines = stdout.strip().splitlines()
        try:
            answer = json.loads(lines[-1])
        except (IndexError, ValueError):
            told = (stderr.strip().splitlines() or ["nothing was said"])[-1]
            findings.fail("C6 planning", f"importing the method ends the interpreter: {told}")
            return
        if answer["error"]:
            findings.fail(
                "C6 planning",
                f"what the planner does with the method fails in a fresh process: {' '.join(answer['error'].split())}; "
                "define it in a module that can be imported, and give check_method parameters that can be used",
            )
        if answer["imported"]:
            findings.fail(
                "C6 planning",
                f"planning with the method imports {' and '.join(answer['imported'])}; import heavy packages inside "
                "the functions that compute (and under `if TYPE_CHECKING:` for annotations), so that everybody's "
                "`orchestrator plan` stays fast",
            )

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
