"""The Prefect API that a run talks to: the one that is configured, or an embedded server.

The embedded server is a child process that we start ourselves, because Prefect's own ephemeral server is orphaned
when its parent is killed, restarts for ever when its database cannot be opened, dies of the parent's Ctrl-C before
the flow run's last state is recorded, and writes tracebacks to the terminal.
"""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from orchestrator.addresses import without_password
from orchestrator.errors import PreflightError

WITHOUT_PREFECT = "use --local to run without Prefect"
_SERVER_DEFAULTS = {"PREFECT_API_BLOCKS_REGISTER_ON_START": "false"}  # 4 s of the first start, and we use no blocks
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b")  # how the last line of a traceback begins
_REQUEST_SECONDS = 8.0
_CHECK_SECONDS = 18.0
_STOP_SECONDS = 60.0  # a server that is asked to stop while it starts first completes its database


@dataclass(frozen=True)
class EmbeddedServer:
    """A server that may still be starting."""

    url: str
    process: subprocess.Popen[bytes]
    ready: int
    log: IO[bytes]

    def wait(self, timeout_seconds: float) -> None:
        """Return once the server answers. Raises `PreflightError` if it dies, or takes longer than the timeout."""
        readable, _, _ = select.select([self.ready], [], [], timeout_seconds)
        if readable and os.read(self.ready, 16):
            return
        if not readable:
            raise PreflightError(
                f"the embedded Prefect server did not start within {timeout_seconds:g} s",
                remedy=f"set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more, or {WITHOUT_PREFECT}",
            )
        self.process.wait(_STOP_SECONDS)
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").splitlines()
        reasons = [line for line in said if _EXCEPTION.match(line)] or said or ["it said nothing"]
        reason = without_password(reasons[-1])
        raise PreflightError(
            f"the embedded Prefect server did not start (exit code {self.process.returncode}): {reason}",
            remedy=f"{_where_its_database_is()}; {WITHOUT_PREFECT}",
        )


@contextmanager
def embedded_server() -> Iterator[EmbeddedServer]:
    """Start a Prefect server on a free loopback port; it has ended when the block is left."""
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryFile() as log:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        ready, ready_for_child = os.pipe()
        command = [sys.executable, "-P", "-m", "orchestrator_flows.server_process"]
        try:
            process = subprocess.Popen(
                [*command, str(listener.fileno()), str(ready_for_child)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(listener.fileno(), ready_for_child),
                start_new_session=True,  # Ctrl-C is for us: the server has to record what becomes of the run
                env={**_SERVER_DEFAULTS, **os.environ, "PREFECT_UI_ENABLED": "0"},
            )
        finally:
            os.close(ready_for_child)
            listener.close()  # so that connections are refused once the server is gone
        try:
            yield EmbeddedServer(url, process, ready, log)
        finally:
            os.close(ready)
            if process.stdin:
                process.stdin.close()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _where_its_database_is() -> str:
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = settings.server.database.connection_url
    address = url.get_secret_value() if url else ""
    if not address or address.startswith("sqlite"):
        return f"its database is in {settings.home}"
    return f"its database is {without_password(address)}: check PREFECT_API_DATABASE_CONNECTION_URL"


async def check_api(url: str) -> None:
    """Ask the configured Prefect API something. Raises `PreflightError` within 20 s if it does not answer."""
    import asyncio

    import httpx
    from prefect.client.orchestration import get_client

    try:
        async with asyncio.timeout(_CHECK_SECONDS), get_client(httpx_settings={"timeout": _REQUEST_SECONDS}) as client:
            await client.read_flows(limit=1)
    except Exception as error:  # whatever it is, this API cannot be used
        response = getattr(error, "response", None)
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            reason = "it does not answer"
        elif isinstance(response, httpx.Response):
            reason = f"HTTP {response.status_code}"
        raise PreflightError(
            f"the Prefect API at {public(url)} cannot be used: {reason}",
            remedy=f"start it, correct or unset PREFECT_API_URL, or {WITHOUT_PREFECT}",
        ) from None


def public(url: str) -> str:
    """The address without user and password."""
    return without_password(url)
