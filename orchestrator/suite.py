"""Gates are told together: one that failed does not keep the others from being looked at.

The validate steps that measure the same model are a suite. After a failed gate the rest of the suite is run, with the
calibrate steps that it needs, and nothing else; then one `GateError` has every bound that was not met, those on the KV
cache of a register step included, which follow from the model's sizes alone. What fails otherwise ends the run at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.deployment import kv_metrics
from orchestrator.errors import GateError, OrchestratorError, Problem
from orchestrator.gates import GateResult, gate_results
from orchestrator.method import Evaluator, Publisher
from orchestrator.serving import ModelShape

if TYPE_CHECKING:
    from orchestrator.checkpoint import Checkpoint
    from orchestrator.plan import Step
    from orchestrator.run import Execution

REFUSED = "nothing was registered; compress further, or plan with more memory or shorter sequences"


def fit_gates(step: Step, model: Checkpoint) -> list[GateResult]:
    """Hold the KV plans of a register step's engines for `model` against its bounds; [] if it has none."""
    if not step.require:
        return []
    shape = ModelShape.from_config(model.config)
    return gate_results(step, kv_metrics(step.engines, shape, model.weight_bytes()), None)


class Suite:
    """The steps of an execution in their order, and the gates that failed so far.

    ::

        for step in suite.steps():
            with suite.holding(step):
                execution.run_step(step.index)
        suite.end()
    """

    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._refused: Step | None = None  # the first step with a failed gate
        self._problems: list[Problem] = []

    def steps(self) -> Iterator[Step]:
        """Yield the steps to run: all, or after a failed gate those up to the last that measures the same model."""
        for step in self._execution.plan.steps:
            if self._refused and step.index > self._last(self._refused):
                return
            yield step

    @contextmanager
    def holding(self, step: Step) -> Iterator[None]:
        """Keep the failed gates of a validate step that is run in this block. Whatever else it raises passes through,
        with the gates that had failed before."""
        try:
            yield
        except GateError as error:
            if not isinstance(step.method, Evaluator):
                raise
            self._refused = self._refused or step
            self._problems += error.problems
        except OrchestratorError as error:
            if not self._problems:
                raise
            raise type(error)([*error.problems, *self._problems]) from error

    def end(self) -> None:
        """Raise `GateError` with every gate that failed, if one did."""
        if self._refused is None:
            return
        following = self._execution.plan.steps[self._last(self._refused) + 1 :]
        for step in following:
            if isinstance(step.method, Publisher) and step.inputs["model"] == self._refused.inputs["model"]:
                try:
                    self._problems += self._execution.refuse_release(step)
                except OrchestratorError as error:  # an engine that cannot serve this model at all
                    self._problems += error.problems
        raise GateError(self._problems)

    def _last(self, refused: Step) -> int:
        return max(
            step.index
            for step in self._execution.plan.steps
            if isinstance(step.method, Evaluator) and step.inputs["model"] == refused.inputs["model"]
        )
