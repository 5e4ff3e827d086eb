"""Evaluators: quality of a compressed model beside the dense one, and what it costs to store and to run."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_evaluation.fidelity import Fidelity
from orchestrator_evaluation.footprint import Footprint
from orchestrator_evaluation.perplexity import Perplexity
from orchestrator_evaluation.robustness import Robustness
from orchestrator_evaluation.streaming import Streaming
from orchestrator_evaluation.tasks import Tasks

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the methods of this family."""
    return [Perplexity, Fidelity, Robustness, Footprint, Streaming, Tasks]
