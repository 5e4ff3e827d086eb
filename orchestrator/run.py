"""Executing a plan, step by step: cache hit (verified), compute, gate, record. The in-process engine.

Prefect runs the same `Execution`, one task for a step; it schedules and shows, and is not asked what is done
already. That is the store's business: a step whose result is there, whole and made from the same inputs, is not
computed again.
"""

from __future__ import annotations

import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.artifact import CACHE, Artifact, ArtifactStore, model_digest
from orchestrator.calibration import CalibrationSet
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import GateError, OrchestratorError, Problem, StepError
from orchestrator.fit import check_fit, remember_fit
from orchestrator.gates import GateResult, gate_problems, gate_results
from orchestrator.healing import heal_runs
from orchestrator.home import Settings
from orchestrator.journal import Journal, lease
from orchestrator.layer_method import LayerMethod
from orchestrator.lineage import lineage_of, trained_on
from orchestrator.method import ModelMethod, Publisher
from orchestrator.model import import_libraries
from orchestrator.outcome import StepOutcome, unchanged
from orchestrator.plan import SOURCE, Plan, Step, make_plan
from orchestrator.planned import journal_facts
from orchestrator.plugins import Methods
from orchestrator.preflight import Estimate, foresee, learn
from orchestrator.published import released
from orchestrator.record import RunRecord
from orchestrator.register import release_step
from orchestrator.remaking import Maker
from orchestrator.status import remember
from orchestrator.steps import StepInputs, perform
from orchestrator.suite import REFUSED, Suite, fit_gates
from orchestrator.usage import Usage, base_bytes, has_torch, out_of_memory
from orchestrator.zeros import zeros_of

_DISK_FULL_BYTES = 1 << 20


class Observer(Protocol):
    """Who wants to see a run while it happens."""

    def run_started(self, run_id: str, plan: Plan) -> None:
        """The plan is made; steps follow."""

    def step_started(self, step: Step) -> None:
        """A step is looked at."""

    def step_progress(self, step: Step, fraction: float, message: str) -> None:
        """A step got to `fraction` of its work."""

    def step_finished(self, step: Step, outcome: StepOutcome) -> None:
        """A step has its result."""

    def note(self, message: str) -> None:
        """Something worth saying happened, for instance a damaged artifact was set aside."""


@dataclass
class Execution:
    """One run of a plan. Steps may be run one after the other from any thread."""

    plan: Plan
    settings: Settings
    observer: Observer
    engine: str
    estimates: tuple[Estimate, ...]
    outcomes: dict[int, StepOutcome] = field(default_factory=dict)
    release: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.store = ArtifactStore(self.settings.home)
        self.journal = Journal(self.settings.home)
        self.record = RunRecord(self.plan, self.settings, self.journal.run_id, self.engine)
        self._import_seconds = 0.0  # of the libraries, in the step at work
        self._turn = threading.Lock()  # peak memory is the process's, so steps take turns
        self.journal.begin(self.settings.public_tracking_uri, engine=self.engine, **journal_facts(self.plan))
        self.observer.run_started(self.journal.run_id, self.plan)

    @property
    def run_id(self) -> str:
        """The name of this run and of its journal."""
        return self.journal.run_id

    def run_step(self, index: int) -> StepOutcome:
        """Bring one step's result about. Steps before it must have run.

        Raises `StepError`, `PublishError`, or `GateError` with the failed gates of this step (`Suite` has those of
        others); nothing of a failed step stays in the store, except the evidence of a failed gate.
        """
        step = self.plan.steps[index]
        with self._turn, self._failures_recorded(step):
            self.observer.step_started(step)
            usage = Usage()
            waiting = f"{step.label}: another run is at it; waiting"
            with lease(self.settings.home, step.fingerprint, lambda: self.observer.note(waiting)):
                artifact = self._cached(step)
                cached = artifact is not None
                if cached:  # a run that was killed between its result and its cleaning up
                    self.store.unstage(step.fingerprint)
                if artifact is None:
                    if self.record.mlflow_run is None:
                        self.observer.note(f"recording in MLflow at {self.settings.public_tracking_uri}")
                    self.record.begin()
                    usage = Usage()
                    self.journal.write("step started", step=index, fingerprint=step.fingerprint)
                    artifact = self._compute(step, usage)
            outcome = StepOutcome(
                stage=step.stage.value,
                method=step.method.name,
                fingerprint=step.fingerprint,
                cached=cached,
                seconds=usage.seconds,
                peak_memory_bytes=usage.peak_memory_bytes,
                digest=artifact.digest,
                path=artifact.path,
                metrics=artifact.metrics,
                import_seconds=0.0 if cached else self._import_seconds,
                disk_bytes=artifact.bytes,
                predicted=None if cached else self.estimates[index].as_dict(),
                peak_device_bytes=usage.peak_device_bytes,
                zeros=zeros_of(artifact) if step.makes_model else None,
                gates=tuple(gate_results(step, artifact.metrics, artifact.path)),
            )
            self.outcomes[index] = outcome
            if isinstance(step.method, Publisher):
                self.release = released(artifact)
            took = {} if cached else self._learned(step, outcome)
            held = [gate.as_dict() for gate in outcome.gates]
            facts = {**took, "gates": held} if held else took
            self.journal.write("step finished", step=index, digest=artifact.digest, cached=cached, **facts)
            remedy = f"nothing was registered; the evidence is artifact {artifact.digest[:12]}"
            if self.release and isinstance(step.method, Publisher):
                remedy = f"version {self.release['model_version']} was registered before there was this bound"
            violations = gate_problems(step, outcome.gates, remedy)
            self.record.step(step, outcome, artifact, usage.started_ms, failed=bool(violations))
            self.observer.step_finished(step, outcome)
            if violations:
                raise GateError(violations)
            return outcome

    def refuse_release(self, step: Step) -> list[Problem]:
        """Record which gates of a register step, whose model is there, would fail too; return them as problems."""
        with self._turn:
            gates = fit_gates(step, self._model(step.inputs["model"]))
            earlier = "a version was registered before there was this bound"
            problems = gate_problems(step, gates, earlier if self.store.lookup(step.fingerprint) else REFUSED)
            if problems:
                self._failed(step, "\n".join(map(str, problems)), time.time_ns() // 1_000_000, gates)
            return problems

    def _cached(self, step: Step) -> Artifact | None:
        """The step's artifact, if it is whole and was made from what the steps before gave in this run."""
        artifact = self.store.lookup(step.fingerprint)
        if artifact is None:
            return None
        damage = artifact.damage()
        if damage:
            self.observer.note(
                f"{step.label}: artifact {artifact.digest[:12]} is damaged ({damage}); computing it again"
            )
            self.journal.write("artifact damaged", digest=artifact.digest, damage=damage)
            self.store.discard(artifact)
            return None
        if artifact.manifest["inputs"] != self._input_digests(step):
            self.observer.note(f"{step.label}: its input differs from the one it was made from; computing it again")
            return None
        if isinstance(step.method, Publisher):
            gone = self.record.release_gone(step.method, released(artifact))
            if gone:
                self.observer.note(f"{step.label}: {gone}; releasing again")
                return None
            moved = self.record.restore_alias(step.method, released(artifact))
            if moved:
                self.journal.write("alias moved", step=step.index, what=moved)
                self.observer.note(f"{step.label}: {moved}")
        return artifact

    def _compute(self, step: Step, usage: Usage) -> Artifact:
        walks = isinstance(step.method, LayerMethod)
        resumable = walks or (isinstance(step.method, ModelMethod) and step.method.resumable)
        folder = self.store.stage(step.fingerprint, keep=walks)
        scratch = self.store.stage(f"{step.fingerprint}.scratch")
        state = self.store.stage(f"{step.fingerprint}.state", keep=resumable)
        keep = False
        self._import_seconds = 0.0
        try:
            size = self.estimates[step.index].size
            computes = not isinstance(step.method, Publisher) or bool(step.formats)
            if computes and not (size and size.recorded):
                fresh = not has_torch()
                seconds = import_libraries(self._model(step.inputs["model"]))
                self._import_seconds = seconds if fresh else 0.0
            inputs = self._inputs(step, scratch, state)
            if isinstance(step.method, Publisher):
                lineage = lineage_of(self.plan, step, self.outcomes)
                facts = release_step(self.plan, step, inputs, lineage, self.record, folder, self.outcomes)
            else:
                facts = perform(step, inputs, folder)
            return self.store.commit(
                step.fingerprint,
                folder,
                {
                    "kind": facts.kind,
                    "stage": step.stage.value,
                    "method": step.method.name,
                    "identity": step.identity,
                    "inputs": self._input_digests(step),
                    "invariants": dict(facts.invariants),
                    "metrics": dict(facts.metrics),
                },
                seconds=usage.seconds,
                peak_memory_bytes=usage.peak_memory_bytes,
                predicted=self.estimates[step.index].as_dict(),
            )
        except BaseException as error:
            keep = resumable and _no_fault_of_the_step(error)  # run again, it goes on where it was
            raise
        finally:
            self.store.unstage(f"{step.fingerprint}.scratch" if keep else step.fingerprint)

    def _inputs(self, step: Step, scratch: Path, state: Path) -> StepInputs:
        calibration = step.inputs.get("calibration")
        source = step.inputs["model"]
        return StepInputs(
            model=self._model(source),
            dense=self.plan.source,
            calibration=None if calibration is None else CalibrationSet.load(self.outcomes[calibration].path),
            invariants={} if source == SOURCE else self._artifact(source).manifest["invariants"],
            seed=self.plan.seed,
            scratch=scratch,
            progress=lambda fraction, message: self.observer.step_progress(step, fraction, message),
            model_digest=self.plan.source_digest if source == SOURCE else model_digest(self._artifact(source)),
            state=state,
            statistics=self.settings.home / "statistics",
            cache=self.settings.home / CACHE,
            workers=self.estimates[step.index].workers,
            trained_on=trained_on(self.plan, step, self.outcomes),
            variants=Maker(self.plan, self.store, scratch, lambda at: self.estimates[at].workers).variants(step),
        )

    def _learned(self, step: Step, outcome: StepOutcome) -> dict[str, Any]:
        """Remember what the step took on this machine; return it for the journal, beside what was predicted."""
        learn(
            self.settings.home,
            self.engine,
            step,
            self.estimates[step.index],
            seconds=outcome.seconds - self._import_seconds,
            import_seconds=self._import_seconds,
            base_bytes=base_bytes(),
        )
        measured = ("seconds", "peak_memory_bytes", "disk_bytes", "predicted")
        return {name: value for name, value in outcome.as_dict().items() if name in measured}

    def _model(self, index: int) -> Checkpoint:
        return (
            self.plan.source if index == SOURCE else Checkpoint(self.outcomes[index].path, code=self.plan.source.code)
        )

    def _artifact(self, index: int) -> Artifact:
        return self.store.find(self.outcomes[index].digest)

    def _input_digests(self, step: Step) -> dict[str, str]:
        return {
            role: self.plan.source_digest if index == SOURCE else self.outcomes[index].digest
            for role, index in step.inputs.items()
        }

    @contextmanager
    def _failures_recorded(self, step: Step) -> Iterator[None]:
        """Give every failure a place and a record; turn what a plugin raises into a `StepError`."""
        started_ms = time.time_ns() // 1_000_000
        try:
            yield
        except OrchestratorError as error:
            placed = [Problem(p.what, p.where or step.place, p.remedy) for p in error.problems]
            error.__init__(placed)  # type: ignore[misc]
            if step.index not in self.outcomes:  # a validate step with a failed gate has its record, with the numbers
                refused = isinstance(error, GateError) and isinstance(step.method, Publisher)
                gates = fit_gates(step, self._model(step.inputs["model"])) if refused else []
                self._failed(step, str(error), started_ms, gates)
            raise
        except (Exception, SystemExit) as error:  # a method that calls sys.exit has failed like any other
            path = self.journal.path.with_suffix(".traceback.txt")
            notes = (f"({note})" for note in getattr(error, "__notes__", ()))  # e.g. the layer at which it happened
            message = f"{step.label} failed: {type(error).__name__}: {' '.join([str(error), *notes])}"
            remedy = f"the details are in {path}"
            if shutil.disk_usage(self.settings.home).free < _DISK_FULL_BYTES:
                remedy = f"the disk that holds {self.settings.home} is full: free space and run again"
            elif out_of_memory(error):
                remedy = f"free memory and run again, or set max_memory_gib; the details are in {path}"
            with suppress(OSError):  # a full disk must not hide what happened
                path.write_text(traceback.format_exc(), encoding="utf-8")
                self._failed(step, message, started_ms)
            raise StepError(message, where=step.place, remedy=remedy) from error

    def _failed(self, step: Step, message: str, started_ms: int, gates: Sequence[GateResult] = ()) -> None:
        held = {"gates": [gate.as_dict() for gate in gates]} if gates else {}
        self.journal.write("step failed", step=step.index, error=message, **held)
        self.record.failed_step(step, message, started_ms, gates)

    def finish(self, error: BaseException | None = None) -> None:
        """Close the journal and the tracked run."""
        with self.journal.ending(whole=lambda: not self.record.left_open):
            if error is None:
                self.journal.write("run finished", unchanged=unchanged(self.outcomes))
                remember(self.plan, self.settings.home)
            else:
                kind = type(error).__name__
                self.journal.write("run failed", kind=kind, error=str(error) or kind)
            self._report()
            self.record.finish(self.outcomes, failed=error is not None)

    def _report(self) -> None:
        """Write the page of the run. It only shows: what goes wrong with it is a note."""
        try:
            from orchestrator.html_report import write_run_report

            self.record.page(write_run_report(self.settings.home, self.run_id))
        except Exception as error:
            self.observer.note(f"the report of this run is not whole: {type(error).__name__}: {error}")

    @property
    def report_path(self) -> Path:
        """Where the page of the run is, once the run has ended."""
        return self.journal.path.with_suffix(".html")

    def document(self) -> dict[str, Any]:
        """What `run --json` prints."""
        return {
            "run": self.run_id,
            "pipeline": self.plan.name,
            "unchanged": unchanged(self.outcomes),
            "mlflow_run": self.record.mlflow_run,
            "steps": [self.outcomes[index].as_dict() for index in sorted(self.outcomes)],
            "release": self.release,
            "report": str(self.report_path),
        }


def _no_fault_of_the_step(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | SystemExit | OSError) or out_of_memory(error)


def start(spec_path: Path, methods: Methods, settings: Settings, observer: Observer, engine: str) -> Execution:
    """Plan a specification with every file read, and open an execution of it.

    Raises `SpecError` or `PreflightError`, before anything is computed or written.
    """
    uri = settings.public_tracking_uri
    plan = make_plan(spec_path, methods, settings.home, tracking_uri=uri, trust_file_times=False, may_run_code=True)
    store = ArtifactStore(settings.home)
    known = [store.lookup(step.fingerprint) for step in plan.steps]
    fit = check_fit(plan, known, settings.home)
    estimates = foresee(plan, settings.home, known, engine=engine)
    settings.make_home()
    heal_runs(settings, observer.note)
    remember_fit(settings.home, fit)
    store.sweep()
    return Execution(plan, settings, observer, engine, estimates)


def run_locally(spec_path: Path, methods: Methods, settings: Settings, observer: Observer) -> Execution:
    """Run a specification in this process, without Prefect."""
    execution = start(spec_path, methods, settings, observer, "local")
    with finishing(execution):
        suite = Suite(execution)
        for step in suite.steps():
            with suite.holding(step):
                execution.run_step(step.index)
        suite.end()
    return execution


@contextmanager
def finishing(execution: Execution) -> Iterator[None]:
    """Close the execution, however the block ends."""
    try:
        yield
    except BaseException as error:
        execution.finish(error)
        raise
    execution.finish()
