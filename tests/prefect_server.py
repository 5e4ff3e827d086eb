"""A real Prefect server and workers, in process groups of the tests', and a place with a pipeline to run under them.

The pipeline is a throw-away plugin that counts tensors. The database is whichever the environment names
(`PREFECT_API_DATABASE_CONNECTION_URL`; unset, sqlite in PREFECT_HOME).
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from orchestrator.home import Settings
from tests.s3_server import free_port

ROOT = Path(__file__).parents[1]
DEPLOYMENTS = ROOT / "flows" / "prefect.yaml"
T = TypeVar("T")

PATIENCE_SECONDS = 240  # for one thing to happen on a busy machine
PLUGIN = '''
from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.api import Evaluator, Stage, StepError, hookimpl

ORCHESTRATOR_API = ">=1.0,<2"


class Count(Evaluator):
    """Counts tensors, slowly if asked to."""

    stage: ClassVar[Stage] = Stage.VALIDATE
    name: ClassVar[str] = "count"
    paper: ClassVar[str] = "counting"
    metrics: ClassVar[Mapping[str, str]] = {"tensors": "tensors", "dense_tensors": "tensors of the dense model"}
    broken: bool = Field(False, description="Whether to fail.")
    seconds: float = Field(0.0, ge=0, description="How long to take, seconds.")

    def measure(self, candidate: Any, baseline: Any, context: Any) -> Mapping[str, float]:
        if self.broken:
            raise StepError("the counter is broken", remedy="mend it")
        time.sleep(self.seconds)
        return {"tensors": len(candidate.tensors), "dense_tensors": len(baseline.tensors)}


@hookimpl
def register_methods() -> list[type[Count]]:
    return [Count]
'''


class Workplace:
    """A folder with a model, specifications and an installed plugin; and the environment to run them in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugins = folder / "plugins"
        self.home = folder / "home"
        metadata = self.plugins / "tensor_counter-0.1.dist-info"
        metadata.mkdir(parents=True)
        (self.plugins / "tensor_counter.py").write_text(PLUGIN)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tensor-counter\nVersion: 0.1\n")
        (metadata / "entry_points.txt").write_text("[orchestrator.plugins]\ncounter = tensor_counter\n")
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
        header = json.dumps({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
        (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "HOME": str(folder),  # no Prefect profiles of whoever runs the tests
            "PWD": str(folder),
            "PYTHONPATH": os.pathsep.join([str(self.plugins), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "ORCHESTRATOR_HOME": str(self.home),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
            "DO_NOT_TRACK": "1",
        }

    @property
    def with_prefect_home(self) -> dict[str, str]:
        """The environment for Prefect's own commands."""
        home = str(self.folder / "prefect")
        return {**self.environment, "PREFECT_HOME": home, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

    @property
    def settings(self) -> Settings:
        return Settings(self.home, self.environment["MLFLOW_TRACKING_URI"])

    def spec(self, name: str, last_step: dict[str, Any] | None = None) -> Path:
        """Write a specification with two steps, of which the last one has these keys beside its stage."""
        steps = [{"validate": "count"}, {"validate": "count", "with": {"seconds": 0.01}, **(last_step or {})}]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"version": 1, "name": name, "model": {"id": "model"}, "steps": steps}))
        return path

    def command_line(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `orchestrator` in its own process group."""
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def servers(self) -> list[int]:
        """Process ids of embedded servers that were started from here."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                if b"orchestrator_flows.server_process" in command and (process / "cwd").readlink() == self.folder:
                    found.append(int(process.name))
            except OSError:  # it has ended
                continue
        return found

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask the embedded server's database, which is at rest."""
        with sqlite3.connect(self.home / "prefect" / "prefect.db") as database:
            return database.execute(sql).fetchall()


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], folder: Path, log: Path
) -> Iterator[subprocess.Popen[Any]]:
    """A process group that is gone when the block is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(what: Callable[[], T | None], process: subprocess.Popen[Any], log: Path) -> T:
    """Return what `what` returns once that is something; fail with the log if the process ends or time runs out."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if (found := what()) is not None:
            return found
        if process.poll() is not None:
            break
        time.sleep(0.2)
    pytest.fail(f"it did not happen; exit code {process.poll()}:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def prefect_server(environment: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Start a Prefect server with this environment; give the address of its API once it answers."""
    import httpx

    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"

    def answers() -> bool | None:
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200 or None
        except httpx.TransportError:
            return None

    with running(command, environment, folder, log) as process:
        wait_for(answers, process, log)
        yield url


@contextmanager
def process_worker(
    environment: Mapping[str, str], folder: Path, url: str, name: str = "worker"
) -> Iterator[tuple[subprocess.Popen[Any], Path]]:
    """Start a worker for the pool "compression", made if it is not there; give the process and its log."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "compression", "--type", "process"]
    environment = {"PREFECT_WORKER_QUERY_SECONDS": "1", **environment, "PREFECT_API_URL": url}
    with running(command, environment, folder, log) as process, client(url) as api:

        def pool() -> bool | None:
            return any(pool.name == "compression" for pool in api.read_work_pools()) or None

        wait_for(pool, process, log)
        yield process, log


def deploy(environment: Mapping[str, str], folder: Path, url: str, file: Path = DEPLOYMENTS) -> None:
    """Deploy everything in a deployment file, from this folder."""
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file), "--all"],
        env={**environment, "PREFECT_API_URL": url},
        cwd=folder,
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE_SECONDS,
    )


def client(url: str) -> Any:
    from prefect.client.orchestration import SyncPrefectClient

    return SyncPrefectClient(api=url)
