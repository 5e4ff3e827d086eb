"""For authors of plugins: ``check_method(MyMethod(...))`` tries a method the way the orchestrator will use it.

It needs no network, no GPU and no test framework: everything it uses is made on the spot in a temporary folder. Call
it in a test for every kind of parameters that makes the method take another path.

Checks have a number and a name: `C` for every kind, `L` for a LayerMethod, `M` ModelMethod, `S` Calibrator (sample),
`E` Evaluator, `K` CachePolicy (keep), `P` Publisher, `V` ServingEngine (serve), `F` ExportFormat. `CHECKS` says what
each one asks. None is optional: also a plugin that nobody asked for is imported whenever a plan is made, so it must not
import torch (C6).

Where a method wants a text file, give it `SAMPLE_TEXT`; a file of your own is used as it is. A Publisher without a
`uri` publishes to a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.cache_policy import CachePolicy
from orchestrator.conformance.findings import CHECKS, Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.export_format import ExportFormat
from orchestrator.layer_method import LayerMethod
from orchestrator.method import Calibrator, Evaluator, Method, ModelMethod, Publisher
from orchestrator.serving_engine import ServingEngine

__all__ = ["CHECKS", "SAMPLE_TEXT", "check_method"]

SAMPLE_TEXT = "sample text of orchestrator.testing"
M = TypeVar("M", bound=Method)


def check_method(method: Method) -> None:
    """Try everything the orchestrator relies on. Raises AssertionError with every check that failed.

    method: an instance, with parameters small enough to run in seconds on a model of two blocks.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        raise AssertionError(f"check_method takes an instance of a method, such as MyMethod(); it got {method!r}")
    from orchestrator.conformance.declaration import PlanningProbe, check_declaration

    findings = Findings(f"{type(method).__name__} ({method!r})")
    with tempfile.TemporaryDirectory(prefix="orchestrator-testing-") as folder:
        laboratory = Laboratory.build(Path(folder).resolve())
        method = _with_sample_text(method, laboratory.text)
        check_declaration(method, findings)
        if findings.failed("C1 complete"):
            findings.raise_if_any()
        probe = PlanningProbe(method, laboratory.dense)
        try:
            before = laboratory.digests()
            _check_kind(method, laboratory, findings)
            changed = sorted(name for name, digest in laboratory.digests().items() if before.get(name) != digest)
            findings.expect(
                "C9 inputs untouched", not changed, f"it changed {', '.join(changed)}; write only to context.scratch"
            )
            probe.finish(findings)
        finally:
            probe.stop()
    findings.raise_if_any()


def _with_sample_text(method: M, text: Path) -> M:
    values = method.model_dump()
    samples: dict[str, Any] = {name: str(text) for name, value in values.items() if value == SAMPLE_TEXT}
    for name, value in values.items():
        if isinstance(value, Mapping) and SAMPLE_TEXT in value.values():
            samples[name] = {key: str(text) if part == SAMPLE_TEXT else part for key, part in value.items()}
    return type(method).model_validate({**values, **samples}) if samples else method


def _check_kind(method: Method, laboratory: Laboratory, findings: Findings) -> None:
    """The checks of the method's own kind; their modules import torch."""
    if isinstance(method, LayerMethod):
        from orchestrator.conformance.layer_method import check_layer_method

        check_layer_method(method, findings)
    elif isinstance(method, ModelMethod):
        from orchestrator.conformance.model_method import check_model_method

        check_model_method(method, laboratory, findings)
    elif isinstance(method, Calibrator):
        from orchestrator.conformance.calibrator import check_calibrator

        check_calibrator(method, laboratory, findings)
    elif isinstance(method, Evaluator):
        from orchestrator.conformance.evaluator import check_evaluator

        check_evaluator(method, laboratory, findings)
    elif isinstance(method, CachePolicy):
        from orchestrator.conformance.cache_policy import check_cache_policy

        check_cache_policy(method, laboratory, findings)
    elif isinstance(method, Publisher):
        from orchestrator.conformance.publisher import check_publisher

        check_publisher(method, laboratory, findings)
    elif isinstance(method, ServingEngine):
        from orchestrator.conformance.serving_engine import check_serving_engine

        check_serving_engine(method, laboratory, findings)
    elif isinstance(method, ExportFormat):
        from orchestrator.conformance.export_format import check_export_format

        check_export_format(method, laboratory, findings)
