"""Distillation: training a compressed model to predict as the dense one does."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_distillation.presets import GKD, QAD, QAT, DistiLLM, Logits, MiniLLM

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the methods of this family."""
    return [Logits, GKD, DistiLLM, MiniLLM, QAT, QAD]
