"""What a register step published, as its artifact remembers it."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.artifact import Artifact
from orchestrator.errors import StepError

PUBLISHED_FILE = "published.json"


def released(artifact: Artifact) -> dict[str, Any]:
    """Read what a register step published."""
    try:
        return dict(json.loads((artifact.path / PUBLISHED_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StepError(f"{artifact.path / PUBLISHED_FILE} cannot be read: {error}") from None
