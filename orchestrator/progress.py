"""What a person sees of a run, on stderr: bars on a terminal, plain lines elsewhere. stdout is for results."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.interrupts import check_interrupt

if TYPE_CHECKING:
    from orchestrator.outcome import StepOutcome
    from orchestrator.plan import Plan, Step

_LINE_SECONDS = 10.0  # between two plain progress lines of one step


class TerminalObserver:
    """Follows a run, shows it, and keeps what has happened so far for a report on failure."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._last_line = 0.0
        self._num_steps = 0
        self.run_id: str | None = None
        self.outcomes: list[Mapping[str, Any]] = []

    def __enter__(self) -> TerminalObserver:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[position]}"),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("{task.fields[message]}"),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def run_started(self, run_id: str, plan: Plan) -> None:
        """Name the run."""
        self.run_id = run_id
        self._num_steps = len(plan.steps)
        self.note(f"run {run_id}: {plan.name}, {self._num_steps} steps")

    def step_started(self, step: Step) -> None:
        """Open the step's bar, or print its line."""
        check_interrupt()
        position = f"{step.index + 1}/{self._num_steps}"
        self._last_line = time.monotonic()
        if self._bars:
            self._bar = self._bars.add_task(step.label, total=1.0, position=position, message="")
        else:
            self._line(f"{position} {step.label} ...")

    def step_progress(self, step: Step, fraction: float, message: str) -> None:
        """Move the bar, or print a line now and then. Ends the work if Ctrl-C came and was swallowed."""
        check_interrupt()
        if self._bars and self._bar is not None:
            self._bars.update(self._bar, completed=fraction, message=message)
        elif time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line(f"    {step.label}: {fraction:.0%} {message}")

    def step_finished(self, step: Step, outcome: StepOutcome) -> None:
        """Close the step with how it got its result."""
        self.outcomes.append(outcome.as_dict())
        how = "cached" if outcome.cached else f"{outcome.seconds:.1f} s"
        result = f"{how}, artifact {outcome.digest[:12]}"
        if self._bars and self._bar is not None:
            self._bars.update(self._bar, completed=1.0, message=result)
            self._bar = None
        else:
            self._line(f"    {step.label}: {result}")

    def note(self, message: str) -> None:
        """Print one line above the bars."""
        self._line(message)

    def _line(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
