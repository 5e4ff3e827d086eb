"""Files of results, and what every one of them says of the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.processes import THREADS

FOLDER = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """Date, machine and our versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "threads": min(THREADS, os.cpu_count() or 1),
            "platform": platform.platform(),
            "load": round(os.getloadavg()[0], 2),
        },
        "versions": {
            name: importlib.metadata.version(name) for name in ("compression-orchestrator", "torch", "transformers")
        },
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/NAME.json`."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
