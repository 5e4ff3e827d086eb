"""Checks for an `ExportFormat`: what it writes of the tiny model, twice, and what it refuses while planning."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.canonical import file_sha256
from orchestrator.checkpoint import Checkpoint
from orchestrator.conformance.findings import Findings
from orchestrator.conformance.laboratory import Laboratory
from orchestrator.conformance.surroundings import left_alone
from orchestrator.errors import OrchestratorError
from orchestrator.export_format import ExportFacts, ExportFormat


def check_export_format(method: ExportFormat, laboratory: Laboratory, findings: Findings) -> None:
    """The checks F1 to F5 and C7."""
    for name in method.libraries:
        with findings.attempt("F5 libraries", f"looking for {name}"):
            importlib.metadata.version(name)
    with findings.attempt("F1 accepts", "`check`"), left_alone(findings, "`check`", seed=0):
        method.check(facts_of(laboratory.dense))
    _check_refuses(method, laboratory, findings)
    if findings.failed("F1 accepts"):
        return
    written = [_write(method, laboratory, seed, findings) for seed in (0, 1)]
    if None not in written:
        findings.expect(
            "F3 deterministic",
            written[0] == written[1],
            "two calls of `write` for one model differ; leave out the time",
        )


def facts_of(checkpoint: Checkpoint) -> ExportFacts:
    """What planning knows of a dense model that no step changes."""
    return ExportFacts(checkpoint, frozenset(), {})


def _write(
    method: ExportFormat, laboratory: Laboratory, seed: int, findings: Findings
) -> tuple[dict[str, str], dict[str, float]] | None:
    """Write once; return sha256 by file and the numbers, or None if something failed."""
    context = laboratory.context(0, laboratory.calibration(), lambda fraction, message: None)
    folder = laboratory.folder / "export"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    measured: Any = None
    with findings.attempt("F2 writes", "`write`"), left_alone(findings, "`write`", seed=seed):
        measured = method.write(laboratory.dense, folder, {}, context)
    if findings.failed("F2 writes"):
        return None
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    plain = bool(files) and all(path.is_file() and not path.is_symlink() for path in files)
    findings.expect("F2 writes", plain, "`write` left no file, or something else than plain files")
    numbers = isinstance(measured, Mapping) and all(_is_finite(value) for value in measured.values())
    findings.expect("F2 writes", numbers, f"`write` returned {measured!r}; return finite numbers by name")
    if not (plain and numbers):
        return None
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}, dict(measured)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_refuses(method: ExportFormat, laboratory: Laboratory, findings: Findings) -> None:
    strange = laboratory.folder / "strange"
    shutil.rmtree(strange, ignore_errors=True)
    shutil.copytree(laboratory.dense.path, strange)
    config = json.loads((strange / "config.json").read_text(encoding="utf-8"))
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}), encoding="utf-8")
    try:
        method.check(facts_of(Checkpoint(Path(strange))))
    except OrchestratorError:
        return
    except Exception as error:  # whatever it is, it would reach the user as a fault of the program
        findings.fail(
            "F4 refuses", f"`check` raised {type(error).__name__}: {error}; raise SpecError or PreflightError"
        )
    else:
        findings.fail("F4 refuses", "`check` accepts a model_type that does not exist; carry what is known to be right")
