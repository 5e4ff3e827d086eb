"""Calibrators: where the token windows come from that statistics are collected on."""

from __future__ import annotations

from orchestrator.api import Method, hookimpl
from orchestrator_calibration.text import Text

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[Method]]:
    """Return the methods of this family."""
    return [Text]
