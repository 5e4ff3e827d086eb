"""The flow: one task for each step of the plan, one after the other.

Prefect schedules and shows. What is done already is the store's business, so that tasks have no cache policy and no
retries; their results are references to artifacts, kept as JSON.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from prefect import Task, flow, get_client, get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run

from orchestrator.errors import OrchestratorError, OverlapError
from orchestrator.home import HOME_VARIABLE, Settings
from orchestrator.plan import Step
from orchestrator.plugins import discover
from orchestrator.presence import Presence, alone
from orchestrator.record import REPORT_FILE
from orchestrator.report import metric_rows, shown
from orchestrator.run import Execution, finishing, start
from orchestrator.spec import load_spec
from orchestrator.suite import Suite
from orchestrator.tracking import is_server
from orchestrator_flows.heal import arrive
from orchestrator_flows.nights import REFUSED, give_way, watched
from orchestrator_flows.observers import LogObserver, Relay
from orchestrator_flows.output import outlive_reader

T = TypeVar("T")
UNCHANGED = "Unchanged"
_DEFAULT_HOME = f", as {HOME_VARIABLE} is not set where the worker runs"


class Conduct(Protocol):
    """Runs a function that computes for minutes outside of the event loop, and awaits it."""

    async def __call__(self, function: Callable[[], T]) -> T:
        """Return what the function returns, raise what it raises."""


@dataclass(frozen=True)
class Given:
    """An execution that was opened, and is closed, by whoever called the flow; and where its steps are run."""

    execution: Execution
    conduct: Conduct
    ended: ExitStack = field(default_factory=ExitStack)  # what to do once Prefect knows how the run ended


_given: ContextVar[Given | None] = ContextVar("given", default=None)


@contextmanager
def giving(execution: Execution, conduct: Conduct) -> Iterator[None]:
    """Let `compress`, called in this block, run `execution`."""
    given = Given(execution, conduct)
    token = _given.set(given)
    try:
        with given.ended:
            yield
    finally:
        _given.reset(token)


@flow(name="compress", persist_result=True, result_serializer="json", retries=0, validate_parameters=True)
async def compress(spec: str, overlap: Literal["wait", "refuse"] = "wait") -> Any:
    """Compress a model as a specification says.

    spec: path of the specification, relative to the working folder. overlap: whether to wait for another run of the
    same pipeline in this home, or to end at once and say who is at work. Returns the document of
    `orchestrator run --json`. Raises `OrchestratorError`.
    """
    logger = get_run_logger()
    given = _given.get()
    if not given:
        outlive_reader()
    settings = given.execution.settings if given else Settings.from_environment()
    settings.make_home()
    async with get_client() as client:
        me = await client.read_flow_run(flow_run.id)
        present = await arrive(client, settings.home, me, logger)
        if given:
            given.execution.observer = Relay(given.execution.observer, LogObserver(logger))
            present.add(run=given.execution.run_id)
            given.ended.callback(present.leave)
            return await _run_steps(given.execution, given.conduct)
        instead = await give_way(client, me)
    if instead:
        return instead
    logger.info("the home is %s%s", settings.home, "" if os.environ.get(HOME_VARIABLE) else _DEFAULT_HOME)
    who = f"process {present.facts['pid']} of {present.facts['user']} on {present.facts['host']}"
    async with watched(me, who, logger):
        return await _run(Path(spec), settings, present, overlap == "refuse")


async def _run(spec: Path, settings: Settings, present: Presence, refuse: bool) -> Any:
    """Run a specification in the process of a worker; return the document, or the state to end in."""
    logger = get_run_logger()
    with ExitStack() as stack:
        if refuse:
            pipeline = (await in_thread(lambda: load_spec(spec))).spec.name
            present.add(pipeline=pipeline)
            try:
                stack.enter_context(alone(settings.home, pipeline))
            except OverlapError as error:
                return State(type=StateType.CANCELLED, name=REFUSED, message=f"refused: {error}")
        execution = await in_thread(lambda: start(spec, discover(), settings, LogObserver(logger), "prefect"))
        present.add(run=execution.run_id)
        with finishing(execution):
            document = await _run_steps(execution, in_thread)
    if not document["unchanged"]:
        return document
    message = f"nothing has changed: all {len(document['steps'])} steps are in the store, nothing was released"
    return State(type=StateType.COMPLETED, name=UNCHANGED, message=message, data=document)


async def _run_steps(execution: Execution, conduct: Conduct) -> dict[str, Any]:
    async with get_client() as client:
        await client.set_flow_run_name(flow_run.id, f"{execution.plan.name}-{execution.run_id}")
    try:
        suite = Suite(execution)
        for step in suite.steps():
            with suite.holding(step):  # its task has failed, and the flow run fails when the others have been measured
                await _task(execution, step, conduct)()
        await conduct(suite.end)
    except OrchestratorError:
        await _show(execution)  # the numbers that a gate refused; what was measured before a step failed
        raise
    await _show(execution)
    return execution.document()


def _task(execution: Execution, step: Step, conduct: Conduct) -> Task[[], Coroutine[Any, Any, dict[str, Any]]]:
    async def run_step() -> dict[str, Any]:
        outcome = await conduct(lambda: execution.run_step(step.index))
        return outcome.as_dict()

    return Task(
        run_step,
        name=step.label,
        task_run_name=step.label,
        description=f"{step.label}, fingerprint {step.fingerprint}",
        tags={step.stage.value},
        cache_policy=NO_CACHE,
        retries=0,
        persist_result=True,
        result_serializer="json",
    )


async def _show(execution: Execution) -> None:
    """Publish the metrics and the release as Prefect artifacts."""
    document = execution.document()
    key = artifact_key(execution.plan.name)
    rows = metric_rows(document["steps"])
    if rows:
        await acreate_table_artifact(
            key=f"{key}-metrics",
            table=[
                {
                    "metric": row.name,
                    "dense": shown(row.name, row.dense),
                    "compressed": shown(row.name, row.compressed),
                    "ratio": shown("ratio", row.ratio),
                }
                for row in rows
            ],
            description=f"{execution.plan.name}, run {execution.run_id}",
        )
    release = document["release"]
    if release:
        await acreate_markdown_artifact(
            key=f"{key}-release",
            markdown=f"`{release['uri']}`\n\n"
            f"- digest `{release['digest']}`\n"
            f"- registered as `models:/{release['model_name']}/{release['model_version']}`\n"
            f"- {len(release['files'])} files\n",
            description=f"Release of {execution.plan.name}, run {execution.run_id}",
        )
    await acreate_markdown_artifact(
        key=f"{key}-report",
        markdown=_report_note(execution),
        description=f"Report of {execution.plan.name}, run {execution.run_id}",
    )


def _report_note(execution: Execution) -> str:
    """Where the page of the run is, and what the gates said, in Markdown."""
    lines = [f"[{execution.report_path.name}]({execution.report_path.as_uri()}), written when the run ends."]
    tracking, run = execution.settings.public_tracking_uri, execution.record.mlflow_run
    if run and is_server(tracking):
        lines.append(f"[The same in MLflow]({tracking.rstrip('/')}/#/runs/{run}), as `{REPORT_FILE}`.")
    gates = [gate for step in execution.document()["steps"] for gate in step.get("gates", ())]
    said = [f"- {'passed' if gate['passed'] else '**failed**'}: {gate['what']}" for gate in gates]
    return "\n\n".join([*lines, "\n".join(said)]).strip()


def artifact_key(name: str) -> str:
    """The name of a pipeline as Prefect allows it in the key of an artifact: lower-case letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


async def in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread that does not keep the process alive when the flow run is cancelled."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="step", daemon=True).start()
    return await asyncio.wrap_future(future)
