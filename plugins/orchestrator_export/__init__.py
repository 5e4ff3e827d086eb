"""File formats beside the Hugging Face folder that a release is, written under `formats:` of a register step."""

from __future__ import annotations

from orchestrator.api import ExportFormat, hookimpl
from orchestrator_export.gguf import GGUF
from orchestrator_export.openvino import OpenVINO

ORCHESTRATOR_API = ">=1.0,<2"


@hookimpl
def register_methods() -> list[type[ExportFormat]]:
    """The formats of this package."""
    return [GGUF, OpenVINO]
