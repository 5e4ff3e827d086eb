"""The command about pages: ``orchestrator report REF`` and ``orchestrator report A B``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_output import print_json, print_text, results_only, say
from orchestrator.errors import PreflightError, SpecError

if TYPE_CHECKING:
    from orchestrator.home import Settings
    from orchestrator.html_report import RunView

STDOUT = "-"
Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF", help="A run or its journal, a digest or its first characters, a path, or models:/NAME@ALIAS."
    ),
]
Other = Annotated[str | None, typer.Argument(metavar="OTHER", help="Compare with this one.")]
OutputOption = Annotated[
    str | None, typer.Option("--output", metavar="FILE", help="Where to write the page; - for stdout. Default: runs/.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("report")(report)


@results_only
def report(reference: Reference, other: Other = None, output: OutputOption = None, as_json: JsonOption = False) -> None:
    """Write the page of a run, or of two runs beside each other: one HTML file that needs nothing else."""
    from orchestrator.home import Settings
    from orchestrator.html_report import comparison_page, report_path, run_page, verdict

    if as_json and output == STDOUT:
        raise SpecError("--json and --output - both want stdout", remedy="leave one out, or give --output a file")
    settings = Settings.from_environment()
    views = [view_of(name, settings) for name in (reference, other) if name is not None]
    names = [view.run or view.steps[-1].digest or view.title for view in views]
    path = report_path(settings.home, names[0] if len(names) == 1 else f"{names[0]}-and-{names[1]}")
    if output not in (None, STDOUT):
        path = Path(str(output))
    gone = [label for view in views for label in view.gone]
    if gone and output is None and path.is_file():
        say(f"kept as it was when the artifacts were there that are gone now: {', '.join(gone)}")
    else:
        page = run_page(views[0]) if len(views) == 1 else comparison_page(views[0], views[1])
        if output == STDOUT:
            print_text(page.rstrip("\n"))
            return
        _write(path, page)
    if as_json:
        verdicts = [{"run": view.run, "pipeline": view.title, "verdict": verdict(view)} for view in views]
        print_json({"report": str(path.absolute()), "runs": verdicts})
    else:
        print_text(str(path))


def view_of(reference: str, settings: Settings) -> RunView:
    """What a reference means: a run, or the last run that made an artifact, or what the artifact came from.

    Raises `SpecError` if it means nothing.
    """
    from orchestrator.artifact import ArtifactStore
    from orchestrator.html_report import is_run, read_lineage, read_run, run_that_made
    from orchestrator.lookup import find_artifact

    if is_run(settings.home, reference):
        return read_run(settings.home, reference)
    path = Path(reference)
    if path.suffix == ".jsonl" and path.is_file():  # the journal of a run, in whichever home
        home = path.resolve().parent.parent
        if not is_run(home, path.stem):
            raise SpecError(f"{path} is no journal in the folder runs/ of a home", remedy="name the run by its id")
        return read_run(home, path.stem)
    if reference.startswith("models:/"):
        from orchestrator.registry import ModelRegistry

        tags = ModelRegistry(settings.tracking_uri).resolve(reference).tags
        record = ArtifactStore(settings.home).record(tags.get("orchestrator.fingerprint", ""))
        run = run_that_made(settings.home, record.digest) if record else None  # its release comes after its model
        if run:
            return read_run(settings.home, run)
    artifact, _ = find_artifact(reference, settings)
    run = run_that_made(settings.home, artifact.digest)
    return read_run(settings.home, run) if run else read_lineage(settings.home, artifact)


def _write(path: Path, page: str) -> None:
    from orchestrator.canonical import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    except OSError as error:
        raise PreflightError(f"{path} cannot be written: {error.strerror}", remedy="give --output FILE") from None
