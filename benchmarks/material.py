"""The data that benchmarks run on: a folder of models and texts that is not part of the project.

`ORCHESTRATOR_SHARED_DATA`, or `../shared/data` beside the repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def shared_data() -> Path:
    """Return the folder; ends the program with a clear reason where it is missing."""
    folder = Path(os.environ.get("ORCHESTRATOR_SHARED_DATA") or REPOSITORY.parent / "shared" / "data").resolve()
    if not folder.is_dir():
        print(f"skipped: {folder} is missing; set ORCHESTRATOR_SHARED_DATA, or give --model and --text")
        sys.exit(0)
    return folder


def split_text(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first half of a text to calibrate on and the second to evaluate on; return both files.

    Halves of one text: of the same kind, and no line is in both.
    """
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    half = sum(map(len, lines)) / 2
    seen = 0
    parts: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        parts[seen >= half].append(line)
        seen += len(line)
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for path, part in zip(paths, parts, strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths
