"""What a run leaves in MLflow: a parent run, a child run for each step, and the registered version.

The parent run is opened when the first step has to be computed: a run that finds everything cached leaves no trace,
because nothing happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from orchestrator.artifact import Artifact
from orchestrator.errors import OrchestratorError, Problem
from orchestrator.gates import GateResult, read_intervals
from orchestrator.home import Settings
from orchestrator.method import Publisher
from orchestrator.plan import Plan, Step
from orchestrator.registry import ModelRegistry
from orchestrator.remote_code import KEY
from orchestrator.report import as_markdown, metric_rows
from orchestrator.steps import CURVES_FILE
from orchestrator.tracking import RunStatus, Tracker

if TYPE_CHECKING:
    from orchestrator.outcome import StepOutcome

EXPERIMENT = "orchestrator"
REPORT_FILE = "report.html"


class RunRecord:
    """One run's record. `mlflow_run` is the id of the parent run once there is one.

    left_open: whether MLflow could not be told how the run ended; the next run tells it (`healing`).
    """

    def __init__(self, plan: Plan, settings: Settings, run_id: str, engine: str) -> None:
        self._plan = plan
        self._run_id = run_id
        self._engine = engine
        self._tracker = Tracker(settings.tracking_uri, EXPERIMENT)
        self.registry = ModelRegistry(settings.tracking_uri, settings.home)
        self.mlflow_run: str | None = None
        self.left_open = False
        self._waiting: list[Callable[[str], object]] = []  # cached steps before the first computed one

    def begin(self) -> str:
        """Open the parent run if it is not open yet. Raises `PreflightError` if MLflow cannot be reached."""
        if self.mlflow_run is None:
            try:
                self._tracker.check()
            except OrchestratorError as error:
                raise type(error)([Problem(p.what, p.where or "MLflow", p.remedy) for p in error.problems]) from error
            plan = self._plan
            params = {"model": plan.source.path.name, "seed": plan.seed, "steps": len(plan.steps)}
            for step in plan.steps:
                params[f"{step.index}.{step.stage}"] = step.method.name
            tags = {
                "orchestrator.run": self._run_id,
                "orchestrator.engine": self._engine,
                "orchestrator.model": plan.source_digest,
                **({f"orchestrator.{KEY}": plan.source.code.described()[:4000]} if plan.source.code else {}),
            }
            self.mlflow_run = self._tracker.start_pipeline(plan.name, params, tags)
            for log in self._waiting:
                log(self.mlflow_run)
            self._waiting.clear()
        return self.mlflow_run

    def step(self, step: Step, outcome: StepOutcome, artifact: Artifact, started_ms: int, *, failed: bool) -> None:
        """Record a step that has its result; `failed` if that violates a gate."""
        ended_ms = time.time_ns() // 1_000_000
        metrics: dict[str, float] = {**outcome.metrics, "step_seconds": outcome.seconds}
        for name, (low, high) in read_intervals(artifact.path).items():
            metrics |= {f"{name}.low": low, f"{name}.high": high}
        if not outcome.cached:
            metrics["step_peak_memory_bytes"] = outcome.peak_memory_bytes
            metrics["step_disk_bytes"] = outcome.disk_bytes
            metrics |= {f"predicted_{name}": value for name, value in (outcome.predicted or {}).items()}

        def log(parent: str) -> None:
            self._tracker.log_step(
                parent,
                name=step.label,
                params=_parameters(step),
                metrics=metrics,
                tags=_tags(step, cached=outcome.cached)
                | {"orchestrator.artifact": artifact.digest}
                | _gate_tags(outcome.gates),
                manifest=artifact.manifest,
                started_ms=started_ms,
                ended_ms=ended_ms,
                status="FAILED" if failed else "FINISHED",
                curves=_curves(artifact),
            )

        if failed:
            with suppress(OrchestratorError):  # what was refused is told by the caller, and is what matters
                self.begin()  # the evidence belongs there, although all of it may be in the store already
        if self.mlflow_run is None:
            self._waiting.append(log)
        else:
            log(self.mlflow_run)

    def failed_step(self, step: Step, message: str, started_ms: int, gates: Sequence[GateResult] = ()) -> None:
        """Record a step that failed, or whose gates did. MLflow being the reason itself must not hide the failure."""
        if self.mlflow_run is None:
            return
        try:
            self._tracker.log_step(
                self.mlflow_run,
                name=step.label,
                params=_parameters(step),
                metrics={gate.metric: gate.value for gate in gates},
                tags=_tags(step, cached=False) | {"orchestrator.error": message[:4000]} | _gate_tags(gates),
                manifest={"identity": step.identity, "error": message},
                started_ms=started_ms,
                ended_ms=time.time_ns() // 1_000_000,
                status="FAILED",
            )
        except OrchestratorError:
            # The step's own error is raised by the caller, and is what matters.
            self.mlflow_run, self.left_open = None, True

    def release_gone(self, publisher: Publisher, release: Mapping[str, Any]) -> str | None:
        """Return what of a recorded release is no longer there, or None."""
        found = publisher.find(release["name"])
        if found is None or found.digest != release["digest"]:
            return f"the release is no longer at {release['uri']}"
        if not self.registry.version_exists(release["model_name"], release["model_version"]):
            return f"version {release['model_version']} of {release['model_name']} is no longer in the model registry"
        return None

    def restore_alias(self, publisher: Publisher, release: Mapping[str, Any]) -> str | None:
        """Let the publisher's alias name this release again, if another version has it now; return what was done."""
        alias, name, version = publisher.alias, release["model_name"], release["model_version"]
        if alias is None:
            return None
        held_by = self.registry.alias_version(name, alias)
        if held_by == version:
            return None
        self.registry.set_alias(name, alias, version)
        before = f"version {held_by}" if held_by else "no version"
        return f"alias {alias} of {name} moved from {before} to version {version}"

    def page(self, html: str) -> None:
        """Keep the page of the run with it, if there is a parent run."""
        if self.mlflow_run is not None:
            self._tracker.log_page(self.mlflow_run, REPORT_FILE, html)

    def finish(self, outcomes: Mapping[int, StepOutcome], *, failed: bool) -> None:
        """Close the parent run, if there is one; remember what the next run will want to know of the registry."""
        if self.mlflow_run is not None:
            self._close(self.mlflow_run, outcomes, failed=failed)
        if not failed:
            self.registry.remember()  # last, because closing the run writes to the same database

    def _close(self, run: str, outcomes: Mapping[int, StepOutcome], *, failed: bool) -> None:
        rows = metric_rows(outcome.as_dict() for _, outcome in sorted(outcomes.items()))
        metrics = {row.name: row.compressed for row in rows} | {
            f"dense_{row.name}": row.dense for row in rows if row.dense is not None
        }
        status: RunStatus = "FAILED" if failed else "FINISHED"
        models = [outcome for index, outcome in sorted(outcomes.items()) if self._plan.steps[index].makes_model]
        table = as_markdown(rows) if rows else ""
        if models and models[-1].zeros:
            table += f"\n{models[-1].zeros}\n"
        try:
            self._tracker.finish_pipeline(run, status, metrics, table or None)
        except OrchestratorError:
            self.left_open = True
            if not failed:  # otherwise the failure that is on its way up is the one to see
                raise


def _tags(step: Step, *, cached: bool) -> dict[str, str]:
    return {
        "orchestrator.stage": step.stage.value,
        "orchestrator.method": step.method.name,
        "orchestrator.fingerprint": step.fingerprint,
        "orchestrator.cached": str(cached).lower(),
    }


def _gate_tags(gates: Sequence[GateResult]) -> dict[str, str]:
    return {
        f"orchestrator.gate.{index}": f"{'passed' if gate.passed else 'failed'}: {gate.what}"
        for index, gate in enumerate(gates)
    }


def _curves(artifact: Artifact) -> dict[str, list[tuple[int, float]]]:
    """What a step recorded update by update; {} if it did not."""
    if CURVES_FILE not in artifact.manifest["files"]:
        return {}
    curves = json.loads((artifact.path / CURVES_FILE).read_text(encoding="utf-8"))
    return {name: [(int(update), float(value)) for update, value in curve] for name, curve in curves.items()}


def _parameters(step: Step) -> dict[str, Any]:
    """The parameters of a step's method, and of the cache policy that it measures."""
    flat = _flat(step.identity["parameters"])
    policy = step.identity.get("policy")
    return flat | {"policy": policy["name"], **_flat(policy["parameters"], "policy.")} if policy else flat


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
