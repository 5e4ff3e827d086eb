"""A page that people open: what a run made of a model, in one HTML file that needs nothing else.

| module | what it does |
|---|---|
| `facts` | reads journal and artifacts; says what is missing |
| `findings` | gates with margins, the verdict, what was measured |
| `layers` | layers with errors, what was damped, dead, or fell back |
| `sections`, `layer_sections`, `release_sections` | the parts of the page |
| `page` | the page of one run |
| `comparison` | two runs beside each other |
| `charts` | bars, lines and the map of layers, as SVG |
| `tables` | tables, numbers, digests |
| `palette` | colours, light and dark |
| `markup` | escaping by construction |

Decides no result. Imports no torch, and nothing that takes time.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.canonical import write_atomically
from orchestrator.html_report.comparison import comparison_page
from orchestrator.html_report.facts import RunView, is_run, read_lineage, read_run, run_that_made
from orchestrator.html_report.findings import gates_of, verdict_of
from orchestrator.html_report.page import run_page

__all__ = [
    "RunView",
    "comparison_page",
    "is_run",
    "read_lineage",
    "read_run",
    "report_path",
    "run_page",
    "run_that_made",
    "verdict",
    "write_run_report",
]


def report_path(home: Path, run_id: str) -> Path:
    """Where the page of a run is written."""
    return home / "runs" / f"{run_id}.html"


def write_run_report(home: Path, run_id: str) -> str:
    """Write the page of a run beside its journal, and return it. Raises `SpecError` if there is no such run."""
    page = run_page(read_run(home, run_id))
    write_atomically(report_path(home, run_id), page.encode())
    return page


def verdict(run: RunView) -> str:
    """The run in a word: "passed", "refused", "failed", "unfinished" or "no gates"."""
    return verdict_of(run, gates_of(run)).word
