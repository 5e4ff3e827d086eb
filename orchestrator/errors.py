"""What went wrong, where, and what to do; and the exit code that scripts can rely on.

Every mistake a user can make ends as one of these, shown as one message without a traceback.
Anything else that reaches the top is a bug in this project, and is shown as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.foreign import shown


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    what: a sentence naming the fault and the offending value.
    where: the place, e.g. ``specs/llama.yaml:9: steps[1].prune``; None if there is no better place than `what`.
    remedy: what to do about it.

    As text it can be shown: what a file said is shortened, and cannot steer the terminal.
    """

    what: str
    where: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        place = f"{shown(self.where)}: " if self.where else ""
        remedy = f"; {shown(self.remedy)}" if self.remedy else ""
        return f"{place}{shown(self.what)}{remedy}"


class OrchestratorError(Exception):
    """Base of all errors meant for people. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, what: str | Sequence[Problem], *, where: str | None = None, remedy: str | None = None) -> None:
        self.problems = (Problem(what, where, remedy),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class SpecError(OrchestratorError):
    """The specification, a reference or a command-line argument is wrong. Exit code 2."""

    exit_code = 2


class PreflightError(OrchestratorError):
    """Something outside the specification is missing or unusable, found before any compute. Exit code 3."""

    exit_code = 3


class OverlapError(PreflightError):
    """Another run of the same pipeline is at work, and this one is not to wait for it. Exit code 3."""


class StepError(OrchestratorError):
    """A step could not be completed; nothing of it is left in the store. Exit code 4."""

    exit_code = 4


class GateError(OrchestratorError):
    """A validation bound was not met; the evidence is kept, registration is refused. Exit code 5."""

    exit_code = 5


class PublishError(OrchestratorError):
    """The release or its registration failed; no release is visible. Exit code 6."""

    exit_code = 6


class ConflictError(PublishError):
    """Somebody else was faster, and nothing of this has been done: look again, then decide. Exit code 6."""
