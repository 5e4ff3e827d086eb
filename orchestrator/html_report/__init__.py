"""A page that people open: what a run made of a model, in one HTML file that needs nothing else.

| module       | what it does                                                                       |
|--------------|------------------------------------------------------------------------------------|
| `facts`      | reads journal and artifacts; says what is missing                                  |
| `findings`   | gates with margins, layers with errors, what was damped, dead, or fell back        |
| `sections`   | the parts of the page                                                              |
| `page`       | the page of one run                                                                |
| `comparison` | two runs beside each other                                                         |
| `charts`     | bars, lines and the map of layers, as SVG                                          |
| `tables`     | tables, numbers, digests                                                           |
| `palette`    | colours, light and dark                                                            |
| `markup`     | escaping by construction                                                           |

Decides no result. Imports no torch, and nothing that takes time.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.canonical import write_atomically
from orchestrator.html_report.facts import RunView, read_run
from orchestrator.html_report.page import run_page

__all__ = ["RunView", "read_run", "report_path", "run_page", "write_run_report"]


def report_path(home: Path, run_id: str) -> Path:
    """Where the page of a run is written."""
    return home / "runs" / f"{run_id}.html"


def write_run_report(home: Path, run_id: str) -> Path:
    """Write the page of a run beside its journal. Raises `SpecError` if there is no such run, or `OSError`."""
    path = report_path(home, run_id)
    write_atomically(path, run_page(read_run(home, run_id)).encode())
    return path
