"""A real MLflow database, and a real tracking server process on a loopback port over it.

MLflow needs seconds to create its schema, so it is made once per test process and copied.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
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
def serve_mlflow(database_uri: str, folder: Path) -> Iterator[str]:
    """Run the server in `folder`; yield its address once it answers. RuntimeError with its log if it does not."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = folder / "mlflow-server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database_uri]
    command += ["--artifacts-destination", str(folder / "served"), "--workers", "1", "--port", str(port)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **quiet},
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
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
