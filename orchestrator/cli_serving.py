"""The commands about serving: ``orchestrator serve-config`` and ``orchestrator simulate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli_output import print_json, print_text, results_only
from orchestrator.errors import PreflightError, Problem, SpecError

if TYPE_CHECKING:
    from orchestrator.serving import ModelShape
    from orchestrator.serving_engine import ServingEngine
    from orchestrator.simulation.simulate import PolicyResult, SimulationReport

Reference = Annotated[
    str,
    typer.Argument(metavar="REF", help="A model: a folder, a digest, its first characters, or models:/NAME@ALIAS."),
]
EngineOption = Annotated[str, typer.Option("--engine", help="The serving engine, e.g. vllm.")]
MemoryOption = Annotated[float | None, typer.Option("--gpu-memory-gib", help="Memory of one accelerator, GiB.")]
LengthOption = Annotated[int | None, typer.Option("--max-model-len", help="Longest sequence served, tokens.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any parameter that `methods ENGINE` lists."),
]
WeightsOption = Annotated[
    int | None,
    typer.Option("--weight-bytes", help="Bytes of the weights, for a folder without any."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


TEXTS = ("engine_version", "chart_version")  # parameters that look like numbers and are none


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("serve-config")(serve_config)
    app.command("simulate")(simulate)


@results_only
def serve_config(
    reference: Reference,
    engine: EngineOption,
    gpu_memory_gib: MemoryOption = None,
    max_model_len: LengthOption = None,
    settings: SetOption = None,
    weight_bytes: WeightsOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the arithmetic instead of the files.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Root of a release; the files go to DIR/serving/ENGINE."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the files with which an engine serves a model, its KV cache planned; no model is loaded."""
    import json

    from orchestrator.deployment import PLAN_FILE, README_FILE, serving_files

    method = _engine(engine, gpu_memory_gib, max_model_len, settings)
    shape, size = _model(reference, weight_bytes)
    files = serving_files(method, shape, size)
    target = None if output is None else output / "serving" / method.name
    if target is not None:
        _write(files, target)
    if as_json:
        print_json({"plan": json.loads(files[PLAN_FILE]), "files": files})
    elif explain:
        print_text(files[README_FILE].rstrip("\n"))
    elif target is not None:
        print_text("\n".join(str(target / name) for name in sorted(files)))
    else:
        own = {name: text for name, text in files.items() if name not in (PLAN_FILE, README_FILE)}
        heading = len(own) > 1
        print_text(
            "\n".join((f"==> {name} <==\n" if heading else "") + text.rstrip("\n") for name, text in own.items())
        )


@results_only
def simulate(
    reference: Reference,
    engine: EngineOption,
    gpu_memory_gib: MemoryOption = None,
    max_model_len: LengthOption = None,
    settings: SetOption = None,
    weight_bytes: WeightsOption = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded traffic: JSON lines (also Mooncake's) or CSV (Azure's); also .gz."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Or drawn traffic: requests a second.")] = None,
    requests: Annotated[int, typer.Option(help="Drawn traffic: requests in all.")] = 10_000,
    prompt: Annotated[str, typer.Option(help="Drawn traffic: tokens of a prompt.")] = "lognormal:160",
    answer: Annotated[str, typer.Option(help="Drawn traffic: tokens of an answer.")] = "lognormal:200",
    burstiness: Annotated[
        float, typer.Option(help="Drawn traffic: squared variation of the gaps; 1 is Poisson.")
    ] = 1.0,
    prefixes: Annotated[int, typer.Option(help="Drawn traffic: beginnings that prompts share.")] = 0,
    prefix_tokens: Annotated[int, typer.Option(help="Drawn traffic: tokens of such a beginning.")] = 0,
    samples: Annotated[int, typer.Option(help="Drawn traffic: answers to one prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Drawn traffic: seed.")] = 0,
    step_ms: Annotated[float, typer.Option(help="Time of a step of the engine, ms: reading the weights.")] = 25.0,
    prefill_us: Annotated[float, typer.Option(help="And for each prompt token in it, microseconds.")] = 50.0,
    paged_only: Annotated[bool, typer.Option("--paged-only", help="Leave the preallocated memories out.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw waste and concurrency into an SVG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Put traffic through the planned KV cache: paged, and beside it preallocated as before PagedAttention."""
    from orchestrator.simulation.plot import check_plot, draw
    from orchestrator.simulation.simulate import PAGED, POLICIES, PagedPool, Timing
    from orchestrator.simulation.simulate import simulate as run
    from orchestrator.simulation.traffic import traffic_from_options

    if plot is not None:
        check_plot(plot)
    method = _engine(engine, gpu_memory_gib, max_model_len, settings)
    traffic = traffic_from_options(
        trace=trace,
        rate=rate,
        requests=requests,
        prompt=prompt,
        answer=answer,
        burstiness=burstiness,
        prefixes=prefixes,
        prefix_tokens=prefix_tokens,
        samples=samples,
        seed=seed,
    )
    timing = Timing(step_s=step_ms / 1e3, prefill_token_s=prefill_us / 1e6)
    plan = method.plan(*_model(reference, weight_bytes))
    limits = {
        name: getattr(method, name) for name in ("max_num_seqs", "max_num_batched_tokens") if hasattr(method, name)
    }
    policies = (PAGED,) if paged_only else POLICIES
    report = run(PagedPool.from_plan(plan, **limits), traffic, timing=timing, policies=policies)
    if plot is not None:
        draw(report, plot)
    if as_json:
        print_json(report.as_dict())
    else:
        print_text(_table(report))


def _table(report: SimulationReport) -> str:
    from rich.console import Console
    from rich.table import Table

    rows = list(report.results.values())
    table = Table(title=f"{rows[0].requests:,} requests", title_justify="left")
    for heading in ("", *report.results):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, show in _ROWS.items():
        table.add_row(label, *(show(row) for row in rows))
    console = Console(width=120, no_color=True)
    with console.capture() as drawn:
        console.print(table)
    return drawn.get().rstrip("\n")


_ROWS: dict[str, Callable[[PolicyResult], str]] = {
    "waste": lambda row: f"{row.waste.total:.1%}",
    "  reserved": lambda row: f"{row.waste.reserved:.1%}",
    "  internal": lambda row: f"{row.waste.internal:.1%}",
    "  external": lambda row: f"{row.waste.external:.1%}",
    "memory in use": lambda row: f"{row.memory_in_use:.1%}",
    "sequences running, mean": lambda row: f"{row.mean_running:,.1f}",
    "sequences running, most": lambda row: f"{row.peak_running:,}",
    "tokens a second": lambda row: f"{row.tokens_per_s:,.0f}",
    "waiting, median": lambda row: f"{row.queueing_p50_s:,.2f} s",
    "waiting, 99 %": lambda row: f"{row.queueing_p99_s:,.2f} s",
    "preemptions": lambda row: f"{row.preemptions:,}",
    "prompt tokens from the cache": lambda row: f"{row.prefix_hit_rate:.1%}",
    "refused": lambda row: f"{sum(row.refused.values()):,}",
}


def _engine(name: str, memory: float | None, length: int | None, settings: list[str] | None) -> ServingEngine:
    """Build the engine from the command line. Raises `SpecError` with all that is wrong."""
    from pydantic import ValidationError

    from orchestrator.deployment import check_engine
    from orchestrator.method import Stage
    from orchestrator.plugins import discover
    from orchestrator.serving_engine import ServingEngine
    from orchestrator.spec import validate_strictly

    methods = discover()
    engines = [found.cls for found in methods.installed.values() if issubclass(found.cls, ServingEngine)]
    cls = methods.find(Stage.REGISTER, name).cls
    if not issubclass(cls, ServingEngine):
        names = ", ".join(sorted(engine.name for engine in engines))
        raise SpecError(f"{name!r} is no serving engine", remedy=f"one of {names}")
    given: dict[str, Any] = {"gpu_memory_gib": memory, "max_model_len": length}
    values = {key: value for key, value in given.items() if value is not None}
    for entry in settings or ():
        key, equals, text = entry.partition("=")
        if not equals:
            raise SpecError(f"--set {entry} gives no value", remedy="write --set NAME=VALUE")
        field = key.replace("-", "_")
        values[field] = text if field in TEXTS else _parsed(text)
    try:
        engine = validate_strictly(cls, values)
    except ValidationError as error:
        raise SpecError([_problem(item, cls) for item in error.errors(include_url=False)]) from None
    check_engine(engine, engines)
    return engine


def _parsed(text: str) -> Any:
    from orchestrator.foreign import load_yaml

    try:
        return load_yaml(text)
    except ValueError:
        return text


def _problem(item: Any, cls: type[ServingEngine]) -> Problem:
    import difflib

    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, cls.model_fields, n=1)
        return Problem(
            f"{cls.name} has no parameter {place!r}",
            remedy=f"did you mean {near[0]!r}?" if near else f"`orchestrator methods {cls.name}` lists them",
        )
    said = item["msg"].removeprefix("Value error, ")
    return Problem(
        f"{place}: {said[:1].lower() + said[1:]}", remedy=f"see `orchestrator methods {cls.name}` for what it takes"
    )


def _model(reference: str, weight_bytes: int | None) -> tuple[ModelShape, int]:
    """What a reference says of a model: its shape and the bytes of its weights."""
    from orchestrator.attention import ModelShape
    from orchestrator.checkpoint import Checkpoint, expand_home
    from orchestrator.home import Settings
    from orchestrator.lookup import find_artifact

    folder = expand_home(reference)
    if not reference.startswith("models:/") and (folder / "config.json").is_file():
        model = Checkpoint(folder)
    else:
        artifact, _ = find_artifact(reference, Settings.from_environment())
        if artifact.manifest["kind"] != "model":
            raise SpecError(
                f"{reference} is a {artifact.manifest['kind']}, not a model", remedy="give a model's digest"
            )
        model = Checkpoint(artifact.path)
    if weight_bytes is not None and weight_bytes < 0:
        raise SpecError(f"--weight-bytes {weight_bytes} is no size", remedy="give the bytes of the weight files")
    try:
        size = model.weight_bytes() if weight_bytes is None else weight_bytes
    except PreflightError as error:
        raise PreflightError(error.problems[0].what, remedy="give --weight-bytes, or a folder with weights") from None
    return ModelShape.from_config(model.config), size


def _write(files: dict[str, str], folder: Path) -> None:
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise PreflightError(f"{folder} is there already", remedy="give a folder that does not exist or is empty")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise PreflightError(f"{folder} cannot be written: {error.strerror}", remedy="give another folder") from None
