"""A real MLflow database, and a real tracking server process on a loopback port over it.

MLflow needs seconds to create its schema of sqlite, so it is made once per test process and copied.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from orchestrator.tracking import Tracker
from tests.s3_server import free_port

START_SECONDS = 120


def make_database(folder: Path) -> str:
    """Put an empty MLflow database with its schema into `folder` and return its address."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlflow.db").write_bytes(_schema())
    return f"sqlite:///{folder}/mlflow.db"


@lru_cache(maxsize=1)
def _schema() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        Tracker(f"sqlite:///{path}", "made with the schema").check()
        return path.read_bytes()


@contextmanager
def serve_mlflow(
    database_uri: str,
    folder: Path,
    *,
    destination: str | None = None,
    password: str | None = None,
    port: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[str]:
    """Run the server in `folder`; yield its address once it answers. RuntimeError with its log if it does not.

    destination: where it keeps artifacts, such as ``s3://BUCKET``; a folder by default. password: of the user "admin",
    who alone is let in; without one everybody is.
    """
    port = port or free_port()
    address = f"http://127.0.0.1:{port}"
    log = folder / "mlflow-server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database_uri, "--serve-artifacts"]
    command += ["--artifacts-destination", destination or str(folder / "served"), "--workers", "1", "--port", str(port)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    if password is not None:
        command += ["--app-name", "basic-auth"]
        quiet |= _basic_auth(database_uri, folder, password)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, **quiet},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its worker goes with it
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the MLflow server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _basic_auth(database_uri: str, folder: Path, password: str) -> dict[str, str]:
    """The environment of a server that asks for user and password; who they are is in the database too."""
    settings = folder / "basic-auth.ini"
    settings.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = {database_uri.replace('%', '%%')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 60\n",  # hashing a password takes a tenth of a second, at every request
        encoding="utf-8",
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
    }


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
