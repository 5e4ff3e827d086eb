"""The command line: arguments in, exit code out. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 2 specification or arguments, 3 preflight, 4 step, 5 gate, 6 publish, 130 interrupted, 1 a fault
of this program.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import cli_promotion, cli_report, cli_serving
from orchestrator.cli_output import print_json, print_text, results_only, say
from orchestrator.errors import OrchestratorError, PreflightError, SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.artifact import Artifact
    from orchestrator.home import Settings

ENGINE_GROUP = "orchestrator.engines"
INTERRUPTED = 130

app = typer.Typer(
    name="orchestrator",
    help="Compress language models: calibrate, prune, distill, quantize, validate, register.",
    epilog="Exit codes: 2 specification, 3 preflight, 4 step, 5 gate, 6 publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

cli_report.add_to(app)
cli_serving.add_to(app)
cli_promotion.add_to(app)

SpecArgument = Annotated[Path, typer.Argument(metavar="SPEC", help="The specification, a YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
LocalOption = Annotated[bool, typer.Option("--local", help="Run in this process, without Prefect.")]


def main() -> None:
    """Run the command line and exit."""
    try:
        app(standalone_mode=True)
    except OrchestratorError as error:
        for problem in error.problems:
            say(f"error: {problem}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # outside of a run, which says more
        say("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who reads us has gone: no complaint when stdout is flushed
        sys.exit(0)
    except Exception:
        say(f"This is a fault of compression-orchestrator {version('compression-orchestrator')}, please report it:")
        say(traceback.format_exc())
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        print_text(version("compression-orchestrator"))
        raise typer.Exit


@app.command()
@results_only
def quickstart(local: LocalOption = False, as_json: JsonOption = False) -> None:
    """Run the whole chain on a small model that comes along, offline."""
    from orchestrator.home import Settings
    from orchestrator.quickstart import prepare

    settings = Settings.from_environment()
    settings.make_home()
    _run(prepare(settings.home / "quickstart"), settings, local, as_json)


@app.command()
@results_only
def run(spec: SpecArgument, local: LocalOption = False, as_json: JsonOption = False) -> None:
    """Run a specification; steps whose results are in the store are not computed again."""
    from orchestrator.home import Settings

    settings = Settings.from_environment()
    _run(spec, settings, local, as_json)


@app.command()
@results_only
def plan(spec: SpecArgument, as_json: JsonOption = False) -> None:
    """Check a specification; show its steps, and which are cached or why not."""
    from orchestrator.artifact import ArtifactStore
    from orchestrator.fit import check_fit, remember_fit
    from orchestrator.gate_checks import unnoticed
    from orchestrator.home import Settings
    from orchestrator.plan import make_plan
    from orchestrator.plugins import discover
    from orchestrator.preflight import foresee
    from orchestrator.remote_code import recorded_code
    from orchestrator.report import foreseen
    from orchestrator.status import statuses
    from orchestrator.variants import models_to_make

    settings = Settings.from_environment()
    made = make_plan(spec, discover(), settings.home, tracking_uri=settings.public_tracking_uri)
    found = statuses(made, ArtifactStore(settings.home))
    known = [status.artifact for status in found]
    estimates = foresee(made, settings.home, known)
    remember_fit(settings.home, check_fit(made, known, settings.home, apart=True))
    if as_json:
        print_json(
            {
                "name": made.name,
                "model": {
                    "path": str(made.source.path),
                    "digest": made.source_digest,
                    **recorded_code(made.source.code),
                },
                "steps": [
                    {
                        "stage": step.stage.value,
                        "method": step.method.name,
                        "fingerprint": step.fingerprint,
                        "cached": status.artifact is not None,
                        "why": status.why,
                        "artifact": _reference(status.artifact) if status.artifact else None,
                        "predicted": None if status.artifact else estimate.as_dict(),
                        **({"notes": unnoticed(step)} if unnoticed(step) else {}),
                        **({"models_to_make": len(models_to_make(step, made.steps))} if step.variants else {}),
                    }
                    for step, status, estimate in zip(made.steps, found, estimates, strict=True)
                ],
            }
        )
        return
    print_text(f"{made.name}: {made.source.path} ({made.source_digest[:12]})")
    if made.source.code:
        print_text(f"  `run` will run code that comes with the model: {made.source.code.described()}")
    for step, status, estimate in zip(made.steps, found, estimates, strict=True):
        state = f"cached, artifact {status.artifact.digest[:12]}" if status.artifact else f"to do: {status.why}"
        if not status.artifact:
            making = len(models_to_make(step, made.steps))
            state += f"; makes the model {making} times more" if making else ""
            state += f"; about {foreseen(estimate.as_dict())}"
        print_text(f"{step.index + 1:>3}  {step.label:<22} {step.fingerprint[:12]}  {state}")
        for said in unnoticed(step):
            print_text(f"     {said}")


@app.command()
@results_only
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the parameters of this method.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed methods and where they come from; broken plugins with the reason."""
    from orchestrator.catalogue import as_document, list_methods, show_method
    from orchestrator.plugins import discover

    found = discover()
    if as_json:
        print_json(as_document(found, name))
    elif name:
        print_text(show_method(found, name))
    else:
        print_text(list_methods(found))


@app.command()
@results_only
def show(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="A digest, a unique prefix of one, a path, or models:/NAME@ALIAS.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show an artifact: how it was made, its metrics, invariants and files."""
    from orchestrator.home import Settings
    from orchestrator.lookup import find_artifact
    from orchestrator.report import shown
    from orchestrator.zeros import zeros_of

    settings = Settings.from_environment()
    artifact, registered = find_artifact(reference, settings)
    manifest = artifact.manifest
    if as_json:
        print_json({**_reference(artifact), "registered": registered, "manifest": manifest})
        return
    print_text(f"{manifest['stage']} {manifest['method']}  {artifact.digest}")
    print_text(f"  path         {artifact.path}")
    for key, value in (registered or {}).items():
        print_text(f"  {key:<12} {value}")
    print_text(f"  fingerprint  {manifest['fingerprint']}")
    for role, digest in manifest["inputs"].items():
        print_text(f"  made from    {role} {digest}")
    note = zeros_of(artifact) if manifest["kind"] == "model" else None
    if note:
        print_text(f"  zeros        {note}")
    for title in ("parameters", "invariants", "metrics"):
        values = manifest["identity"]["parameters"] if title == "parameters" else manifest[title]
        if values:
            print_text(f"  {title}")
            for key, value in values.items():
                text = shown(key, value) if title == "metrics" else json.dumps(value)
                print_text(f"    {key:<28} {text}")
    print_text(f"  files        {len(manifest['files'])}, {shown('bytes', artifact.bytes)}")
    for key, entry in manifest["files"].items():
        print_text(f"    {entry['sha256'][:12]}  {entry['bytes']:>12,}  {key}")


@app.command()
@results_only
def pull(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The address of a release, or models:/NAME@ALIAS.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it; must not exist or be empty.")],
    verify_key: Annotated[
        Path | None,
        typer.Option(
            "--verify-key",
            envvar="ORCHESTRATOR_VERIFY_KEY",
            help="Refuse what this public key (PEM) has not signed.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a release and verify every byte of it, its bill of materials and its signature."""
    from orchestrator.home import Settings
    from orchestrator.registry import ModelRegistry
    from orchestrator.signing import signer_of
    from orchestrator.store import open_store

    if uri.startswith("models:/"):
        uri = ModelRegistry(Settings.from_environment().tracking_uri).resolve(uri).source
    root, _, name = uri.rstrip("/").rpartition("/")
    root, _, pipeline = root.rpartition("/")
    if not root or not pipeline:
        raise SpecError(f"{uri!r} is no release address", remedy="it looks like s3://BUCKET/PREFIX/NAME/DIGEST")
    release = open_store(root).fetch(f"{pipeline}/{name}", folder, verify_key=verify_key)
    signer = signer_of(folder, release)
    if as_json:
        signed = {"signed_by": signer, "signature_verified": verify_key is not None}
        print_json({"uri": release.uri, "digest": release.digest, "path": str(folder.absolute()), **signed})
    else:
        print_text(
            f"{release.uri} -> {folder}: {len(release.files)} files, every byte verified ({release.digest[:12]})"
        )
        if signer:
            verified = "verified" if verify_key else "not verified: give its public half with --verify-key"
            print_text(f"signed by the key {signer[:16]}, {verified}")


def _run(spec: Path, settings: Settings, local: bool, as_json: bool) -> None:
    """Run with the chosen engine and print the result: a table, or one JSON document, also of a failed run."""
    from orchestrator.interrupts import interruptible
    from orchestrator.plugins import discover
    from orchestrator.progress import TerminalObserver

    with interruptible(), TerminalObserver(_console()) as observer:
        try:
            if local:
                from orchestrator.run import run_locally

                document = run_locally(spec, discover(), settings, observer).document()
            else:
                document = _engine()(spec, settings, observer)
        except (OrchestratorError, KeyboardInterrupt) as error:
            if as_json:
                failed = {"run": observer.run_id, "steps": observer.outcomes, "release": None}
                print_json({**failed, "report": _report(observer.run_id, settings), "error": _as_document(error)})
            if isinstance(error, KeyboardInterrupt):
                observer.note("interrupted; finished steps are kept, run again to go on")
                raise typer.Exit(INTERRUPTED) from None
            if observer.run_id and not as_json:
                observer.note(f"report {_report(observer.run_id, settings) or 'could not be written'}")
            raise
    document = {**document, "report": _report(document["run"], settings)}
    if as_json:
        print_json(document)
    else:
        _print_result(document, settings)


def _report(run: str | None, settings: Settings) -> str | None:
    """The page of a run; None if there is none, because nothing was begun or it could not be written."""
    path = settings.home / "runs" / f"{run}.html"
    return str(path) if path.is_file() else None


def _as_document(error: OrchestratorError | KeyboardInterrupt) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return {"exit_code": INTERRUPTED, "problems": [{"what": "interrupted", "where": None, "remedy": "run again"}]}
    problems = [{"what": p.what, "where": p.where, "remedy": p.remedy} for p in error.problems]
    return {"exit_code": error.exit_code, "problems": problems}


def _engine() -> Any:
    found = list(entry_points(group=ENGINE_GROUP, name="prefect"))
    if not found:
        raise PreflightError("the Prefect flows are not installed", remedy="use --local, or install the whole package")
    return found[0].load()


def _print_result(document: Mapping[str, Any], settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table

    from orchestrator.report import metric_rows, shown

    console = Console(soft_wrap=False, no_color=True)
    rows = metric_rows(document["steps"])
    if rows:
        table = Table(title=document["pipeline"], title_justify="left")
        for heading in ("", "dense", "compressed", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
        for row in rows:
            name = row.name.replace("_", " ")
            table.add_row(name, shown(row.name, row.dense), shown(row.name, row.compressed), shown("ratio", row.ratio))
        with console.capture() as drawn:
            console.print(table)
        print_text(drawn.get().rstrip("\n"))
    models = [step for step in document["steps"] if step["stage"] in ("prune", "distill", "quantize")]
    if models:
        print_text(f"model     {models[-1]['artifact']['path']}")
        if "zeros" in models[-1]:
            print_text(f"zeros     {models[-1]['zeros']}")
    release = document["release"]
    if release:
        alias = f" @{release['alias']}" if release.get("alias") else ""
        print_text(f"release   {release['uri']}")
        print_text(f"registry  models:/{release['model_name']}/{release['model_version']}{alias}")
    run = f", run {document['mlflow_run']}" if document["mlflow_run"] else ""
    print_text(f"tracking  {settings.public_tracking_uri}{run}")
    print_text(f"journal   {settings.home / 'runs' / document['run']}.jsonl")
    if document["report"]:
        print_text(f"report    {document['report']}")


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _reference(artifact: Artifact) -> dict[str, str]:
    return {"digest": artifact.digest, "path": str(artifact.path)}
