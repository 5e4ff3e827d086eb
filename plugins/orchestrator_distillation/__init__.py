"""Distillation: training a compressed model to predict as the dense one does."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_distillation.logits import Logits

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the methods of this family."""
    return [Logits]
