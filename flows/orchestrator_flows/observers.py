"""Observers for runs under Prefect: one that logs to the flow run, and one that passes everything on to several."""

from __future__ import annotations

import logging
import time
from typing import Any

from orchestrator.outcome import StepOutcome
from orchestrator.plan import Plan, Step
from orchestrator.run import Observer

_LINE_SECONDS = 30.0  # between two progress lines


class LogObserver:
    """Writes what happens to a log, such as Prefect's run logger."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._logger = logger
        self._last_line = 0.0

    def run_started(self, run_id: str, plan: Plan) -> None:
        """Name the run."""
        self._logger.info("run %s: %s, %d steps", run_id, plan.name, len(plan.steps))

    def step_started(self, step: Step) -> None:
        """Name the step and what it is known by."""
        self._last_line = time.monotonic()
        self._logger.info("%d %s, fingerprint %s", step.index + 1, step.label, step.fingerprint[:12])

    def step_progress(self, step: Step, fraction: float, message: str) -> None:
        """Write a line now and then."""
        if time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._logger.info("%s: %.0f%% %s", step.label, 100 * fraction, message)

    def step_finished(self, step: Step, outcome: StepOutcome) -> None:
        """Say how the step got its result."""
        how = "cached" if outcome.cached else f"{outcome.seconds:.1f} s"
        self._logger.info("%s: %s, artifact %s", step.label, how, outcome.digest[:12])

    def note(self, message: str) -> None:
        """Write one line."""
        self._logger.info("%s", message)


class Relay:
    """Passes everything on to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def run_started(self, run_id: str, plan: Plan) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.run_started(run_id, plan)

    def step_started(self, step: Step) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.step_started(step)

    def step_progress(self, step: Step, fraction: float, message: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.step_progress(step, fraction, message)

    def step_finished(self, step: Step, outcome: StepOutcome) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.step_finished(step, outcome)

    def note(self, message: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.note(message)
