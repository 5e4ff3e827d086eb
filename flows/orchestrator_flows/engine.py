"""Running a specification through Prefect from the command line.

The flow's event loop has a thread of its own; the steps compute in the calling thread, where Ctrl-C arrives, so that
an interrupted step ends at once and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from orchestrator.errors import PreflightError, StepError
from orchestrator.home import Settings
from orchestrator.plugins import discover
from orchestrator.run import Execution, Observer, finishing, start
from orchestrator_flows.server import WITHOUT_PREFECT, check_api, embedded_server, public

T = TypeVar("T")

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # Prefect's 20 s are too few for a busy machine
}
_API_URL = "PREFECT_API_URL"
_CANCEL_SECONDS = 15.0  # for Prefect to record that a run was interrupted
_DRAIN_SECONDS = 10.0


def run(spec: Path, settings: Settings, observer: Observer) -> dict[str, Any]:
    """Run a specification as a Prefect flow run; return the document of `orchestrator run --json`.

    Raises `OrchestratorError`, the same as a run without Prefect would.
    """
    execution = start(spec, discover(), settings, observer, "prefect")
    with finishing(execution):
        _prepare_environment(settings.home)
        with _api(observer) as url:
            return _run_flow(execution, url)


def _prepare_environment(home: Path) -> None:
    """Choose for Prefect what the user has not chosen. Must come before Prefect is imported.

    Prefect's own database goes into our home, unless the user has set PREFECT_HOME or has Prefect profiles, which
    may name a server.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_HOME") and not (Path.home() / ".prefect" / "profiles.toml").exists():
        (home / "prefect").mkdir(parents=True, exist_ok=True)
        os.environ["PREFECT_HOME"] = str(home / "prefect")


@contextmanager
def _api(observer: Observer) -> Iterator[str]:
    """Yield the address of a Prefect API that answers: the configured one, or an embedded server's."""
    try:
        from prefect.settings import get_current_settings

        settings = get_current_settings()
    except Exception as error:  # Prefect reads its settings when it is imported
        raise PreflightError(
            f"Prefect cannot be configured: {' '.join(str(error).split())}",
            remedy=f"see the PREFECT_ variables, or {WITHOUT_PREFECT}",
        ) from None
    _quieten()
    url = settings.api.url
    if url:
        asyncio.run(check_api(url))
        yield url
        return
    observer.note("starting a Prefect server for this run")
    with embedded_server() as server:
        import orchestrator_flows.pipeline  # noqa: F401 - takes a second, in which the server starts

        server.wait(settings.server.ephemeral.startup_timeout_seconds)
        with _configured(server.url):
            yield server.url


@contextmanager
def _configured(url: str) -> Iterator[None]:
    """Point Prefect at an API: also its background threads, which see the settings of the process only."""
    from prefect.context import refresh_global_settings_context

    before = os.environ.get(_API_URL)
    os.environ[_API_URL] = url
    refresh_global_settings_context()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_API_URL]
        else:
            os.environ[_API_URL] = before
        refresh_global_settings_context()


class _Unimportant(logging.Filter):
    """Keeps from the terminal what Prefect logs about runs, whose outcome we show ourselves, and its small talk."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
            return False
        return not record.name.startswith("prefect") or record.levelno >= logging.WARNING


def _quieten() -> None:
    """Keep the terminal for progress, unless the user asked for Prefect's log; the API gets all of it."""
    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import PrefectConsoleHandler

    if "PREFECT_LOGGING_LEVEL" in os.environ:
        return
    setup_logging()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler) and not any(isinstance(f, _Unimportant) for f in handler.filters):
            handler.addFilter(_Unimportant())


def _run_flow(execution: Execution, url: str) -> dict[str, Any]:
    """Run the flow in a thread and its steps here, until it ends."""
    import httpx
    from prefect.exceptions import PrefectException, PrefectSignal

    calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    ended = threading.Event()

    async def conduct(function: Callable[[], T]) -> T:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            try:
                future.set_result(function())
            except (Exception, SystemExit) as error:
                future.set_exception(error)

        calls.put(call)
        return await asyncio.wrap_future(future)

    async def main() -> dict[str, Any]:
        try:
            return await _flow(execution, conduct)
        finally:
            ended.set()
            calls.put(None)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="prefect", daemon=True)
    thread.start()
    flow = asyncio.run_coroutine_threadsafe(main(), loop)
    try:
        while call := calls.get():
            call()
        return flow.result()
    except (httpx.HTTPError, PrefectException, PrefectSignal) as error:
        raise StepError(
            f"Prefect failed during the run, at {public(url)}: {type(error).__name__}: {error}",
            remedy=f"finished steps are kept: run again, or {WITHOUT_PREFECT}",
        ) from error
    finally:
        if not ended.is_set():  # interrupted
            flow.cancel()
            ended.wait(_CANCEL_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CANCEL_SECONDS)
        if not thread.is_alive():
            loop.close()


async def _flow(execution: Execution, conduct: Any) -> dict[str, Any]:
    from orchestrator_flows.pipeline import compress, giving

    with giving(execution, conduct):
        try:
            document: dict[str, Any] = await compress(str(execution.plan.spec_path.absolute()))
            return document
        finally:
            await _recorded(execution)


async def _recorded(execution: Execution) -> None:
    """Wait until Prefect has got the log and the last states: it sends them in the background."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    async def drained() -> None:
        await APILogHandler.aflush()
        events: Any = EventsWorker.drain_all()
        await events

    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            await drained()
    except TimeoutError:
        execution.observer.note("Prefect did not take the end of its log")
