"""Chains of steps in this process, without a new interpreter for each: a prefix that was run already is found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from orchestrator.checkpoint import Checkpoint
from orchestrator.home import Settings
from orchestrator.plan import Plan, Step
from orchestrator.plugins import discover
from orchestrator.run import run_locally


class Quiet:
    """An observer that says which step took time."""

    def run_started(self, run_id: str, plan: Plan) -> None:
        """Nothing."""

    def step_started(self, step: Step) -> None:
        """Nothing."""

    def step_progress(self, step: Step, fraction: float, message: str) -> None:
        """Nothing."""

    def step_finished(self, step: Step, outcome: Any) -> None:
        """One line for what was computed."""
        if not outcome.cached and outcome.seconds > 1:
            print(f"    {step.label}: {outcome.seconds:.0f} s", file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        """Nothing."""


class Kitchen:
    """Runs chains on one model; folder: for the specification. home: where results are kept."""

    def __init__(self, model: Path, folder: Path, home: Path) -> None:
        self._model, self._folder = model, folder
        home.mkdir(parents=True, exist_ok=True)
        self._settings = Settings(home, f"sqlite:///{home}/mlflow.db")
        self._methods = discover()

    def run(self, steps: list[dict[str, Any]], seed: int) -> tuple[Checkpoint, dict[str, Any]]:
        """Return the last step's model, and what `run --json` says of that step. Raises `OrchestratorError`."""
        spec = {"version": 1, "name": "benchmark", "model": {"id": str(self._model)}, "seed": seed, "steps": steps}
        path = self._folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        last = run_locally(path, self._methods, self._settings, Quiet()).document()["steps"][-1]
        return Checkpoint(Path(last["artifact"]["path"])), last
