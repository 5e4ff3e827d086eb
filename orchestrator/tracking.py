"""Runs in MLflow: one parent run per pipeline, one child run per step. MLflow shows; it is not the truth.

The only module that imports mlflow for runs (registry.py does for model versions); it does so on first use, because
the import takes seconds. No global state of mlflow is set: every call goes through one client with explicit
addresses, so threads and several trackers do not disturb each other. Nothing is written to the working folder, and
nothing of mlflow's or alembic's log reaches the terminal below level ERROR.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import json
import os
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.addresses import without_password
from orchestrator.canonical import canonical_json
from orchestrator.errors import OrchestratorError, PreflightError, StepError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RunStatus = Literal["FINISHED", "FAILED"]

PROBE_SECONDS = 10.0
PARENT_RUN_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 900  # beside 100 parameters: a batch holds 1000 things
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
REFUSED_CODES = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
CREDENTIALS_REMEDY = (
    "give both in MLFLOW_TRACKING_URI (http://USER:PASSWORD@HOST; in a password @ is %40 and / is %2F) or in "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and see that the user may do this"
)
# Defaults of ours; a user's own setting wins. mlflow reads all of them when it is imported or later.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the JSON document
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # mlflow's own 7 retries take four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_clients: dict[str, MlflowClient] = {}
_clients_lock = threading.Lock()


class Tracker:
    """Writes the runs of one experiment.

    uri: of a tracking server (``http://…``) or a database (``sqlite:////absolute/path.db``, ``postgresql://…``).
    Raises `PreflightError` from `check`, `StepError` from what is written later.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.experiment = experiment
        self._lock = threading.Lock()
        self._experiment_id: str | None = None

    def check(self) -> None:
        """Reach the server or database, creating its schema and our experiment. `PreflightError` if that fails."""
        _probe(self.uri)
        with self._lock:
            self._experiment_id = None
        with translated(self.uri, PreflightError, "cannot be used"):
            self._experiment()

    def start_pipeline(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Open the parent run and return its id."""
        with translated(self.uri, StepError, f"could not start the run {name!r}"):
            run = connect(self.uri).create_run(self._experiment(), tags=_tags(tags), run_name=name)
            run_id = str(run.info.run_id)
            self._log(run_id, params, {}, _now_ms())
            return run_id

    def log_step(
        self,
        parent: str,
        *,
        name: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        manifest: Mapping[str, Any],
        started_ms: int,
        ended_ms: int,
        status: RunStatus,
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> str:
        """Write one finished step as a child run of `parent` and return its id. Times in ms since the epoch.

        curves: by name, (update, value); they become metrics with a history, the update being MLflow's step.
        Long parameters are cut, as MLflow demands; `manifest.json` beside them has everything.
        """
        with translated(self.uri, StepError, f"could not record the step {name!r}"):
            client = connect(self.uri)
            child_tags = {**_tags(tags), PARENT_RUN_TAG: parent}
            run = client.create_run(self._experiment(), start_time=started_ms, tags=child_tags, run_name=name)
            run_id = str(run.info.run_id)
            try:
                self._log(run_id, params, metrics, ended_ms, curves)
                text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
                client.log_text(run_id, text + "\n", "manifest.json")
            except BaseException:
                client.set_terminated(run_id, "FAILED", ended_ms)
                raise
            client.set_terminated(run_id, status, ended_ms)
            return run_id

    def log_page(self, run_id: str, name: str, html: str) -> None:
        """Keep a page among the artifacts of a run, where the user interface shows it."""
        with translated(self.uri, StepError, f"could not keep {name}"):
            connect(self.uri).log_text(run_id, html, name)

    def finish_pipeline(
        self, run_id: str, status: RunStatus, metrics: Mapping[str, float], table_markdown: str | None
    ) -> None:
        """Close the parent run with its final metrics; the table becomes its description and ``metrics.md``."""
        with translated(self.uri, StepError, "could not close the run of the pipeline"):
            client = connect(self.uri)
            self._log(run_id, {}, metrics, _now_ms())
            if table_markdown is not None:
                client.log_text(run_id, table_markdown, "metrics.md")
                client.set_tag(run_id, NOTE_TAG, _cut(table_markdown, MAX_TAG_CHARS))
            client.set_terminated(run_id, status)

    def _experiment(self) -> str:
        """Return the id of the experiment, made on first use with its artifacts beside a sqlite database."""
        with self._lock:
            if self._experiment_id is None:
                client = connect(self.uri)
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    self._experiment_id = _create_experiment(client, self.uri, self.experiment)
                elif found.lifecycle_stage != "active":
                    raise PreflightError(
                        f"the MLflow experiment {self.experiment!r} at {without_password(self.uri)} is deleted",
                        remedy=f"run `mlflow experiments restore -x {found.experiment_id}`, or use another name",
                    )
                else:
                    self._experiment_id = str(found.experiment_id)
            return self._experiment_id

    def _log(
        self,
        run_id: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        at_ms: int,
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param

        client = connect(self.uri)
        values: list[Metric] = [Metric(key, float(value), at_ms, 0) for key, value in sorted(metrics.items())]
        for name, curve in sorted((curves or {}).items()):
            values += [Metric(name, value, at_ms, update) for update, value in curve]
        texts = [Param(key, _cut(_as_text(value), MAX_PARAM_CHARS)) for key, value in sorted(params.items())]
        while values or texts:  # both in one call: most steps then need no second one
            client.log_batch(run_id, metrics=values[:METRICS_PER_BATCH], params=texts[:PARAMS_PER_BATCH])
            values, texts = values[METRICS_PER_BATCH:], texts[PARAMS_PER_BATCH:]


def connect(uri: str) -> MlflowClient:
    """Return the client for `uri`, one per process and address. The first call probes it and may create the schema.

    Raises `PreflightError` within seconds if nothing answers there; anything else that mlflow raises goes through.
    """
    with _clients_lock:
        if uri not in _clients:
            _probe(uri)
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            with _schema_lock(uri):
                client = MlflowClient(tracking_uri=uri, registry_uri=uri)
                client.search_registered_models(max_results=1)  # opens the registry's store too
            _clients[uri] = client
        return _clients[uri]


@contextmanager
def translated(uri: str, kind: type[OrchestratorError], what: str) -> Iterator[None]:
    """Turn what mlflow, its HTTP client, its database or the disk raise into one error of `kind`."""
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:
        if not _is_foreign(error):
            raise
        if _disk_is_full(error):
            raise _full(uri, kind) from error
        shown = f"MLflow at {without_password(uri)} {what}"
        if getattr(error, "error_code", None) in REFUSED_CODES:
            raise kind(f"{shown}: it refuses this user or password", remedy=CREDENTIALS_REMEDY) from error
        first_line = without_password(str(error)).strip().splitlines()[0:1] or [type(error).__name__]
        raise kind(
            f"{shown}: {first_line[0]}",
            remedy="check MLFLOW_TRACKING_URI and that the server or database there works, then run again",
        ) from error


def is_server(uri: str) -> bool:
    """Whether `uri` is a tracking server, as opposed to a database that this process opens itself."""
    return urllib.parse.urlsplit(uri).scheme in ("http", "https")


def _is_foreign(error: Exception) -> bool:
    """Whether an exception comes from outside (mlflow, requests, SQLAlchemy, the disk) and not from a bug of ours."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | sqlite3.Error) or bool(modules & {"mlflow", "requests", "sqlalchemy", "urllib3"})


def _disk_is_full(error: Exception) -> bool:
    """Whether the disk says so, sqlite ("database or disk is full"), or MLflow that passes either on."""
    full = os.strerror(errno.ENOSPC)
    return getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error) or full in str(error)


def _full(uri: str, kind: type[OrchestratorError]) -> OrchestratorError:
    shown = without_password(uri)
    return kind(f"the disk is full on which MLflow at {shown} writes", remedy="free some space there, then run again")


def _probe(uri: str) -> None:
    """Raise `PreflightError` quickly if nothing is there: mlflow's own retries take minutes."""
    shown = without_password(uri)
    try:
        parts = urllib.parse.urlsplit(uri)
        port = parts.port
    except ValueError:  # whose message may hold a part of the password
        raise PreflightError(
            f"{shown} is not an address", remedy="correct MLFLOW_TRACKING_URI; in a password @ is %40 and / is %2F"
        ) from None
    database = parts.scheme.partition("+")[0]
    try:
        if is_server(uri):
            _probe_server(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health")
        elif database == "sqlite":
            _probe_sqlite(sqlite_path(uri))
        elif database in DATABASE_PORTS:
            address = (parts.hostname or "localhost", port or DATABASE_PORTS[database])
            socket.create_connection(address, PROBE_SECONDS).close()
            _probe_database(uri)
        else:
            raise PreflightError(
                f"{shown} is no MLflow tracking address",
                remedy="set MLFLOW_TRACKING_URI to http(s)://…, sqlite:////absolute/path.db or postgresql://…",
            )
    except (OSError, ValueError, sqlite3.Error, http.client.HTTPException) as error:
        if _disk_is_full(error):
            raise _full(uri, PreflightError) from error
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise PreflightError(
            f"MLflow cannot be reached at {shown}: {reason}",
            remedy="start it, or set MLFLOW_TRACKING_URI to one that runs; unset, a local sqlite file is used",
        ) from error


def _probe_server(url: str) -> None:
    """Any answer will do, also a refusal: a proxy may guard this path, and mlflow carries the credentials itself."""
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()


def _probe_database(uri: str) -> None:
    """Log in once: mlflow tries for two minutes, with a wrong password and without the driver too."""
    import sqlalchemy

    shown = without_password(uri)
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        engine.connect().close()
    except (ModuleNotFoundError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise PreflightError(
            f"the driver for MLflow's database at {shown} is not installed: {error}",
            remedy="install it, or name one that is: postgresql+psycopg2://… is of the package psycopg2-binary",
        ) from None
    except sqlalchemy.exc.DBAPIError as error:
        reason = without_password(str(error.orig)).strip().splitlines()[0:1] or [type(error).__name__]
        raise PreflightError(
            f"MLflow's database at {shown} refuses: {reason[0]}",
            remedy="check user and password in MLFLOW_TRACKING_URI",
        ) from None


def _probe_sqlite(path: Path) -> None:
    """Open the database for writing, as mlflow retries a damaged or read-only file for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=PROBE_SECONDS)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        connection.rollback()


def sqlite_path(uri: str) -> Path:
    """Return the absolute path of a ``sqlite:///…`` database."""
    path = uri.partition(":///")[2].partition("?")[0]
    if path in ("", ":memory:"):
        raise PreflightError(f"{uri} would be lost with the process", remedy="name a file: sqlite:////absolute/path.db")
    return Path(path).absolute()


@contextmanager
def _schema_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create a sqlite schema; a kernel lock, so that a killed one does not block others."""
    if not uri.startswith("sqlite"):
        yield
        return
    path = sqlite_path(uri)
    with path.with_name(path.name + ".lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create_experiment(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    # Without a location of its own, a sqlite experiment would write below the working folder.
    location = (sqlite_path(uri).parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        found = client.get_experiment_by_name(name)  # made by another process in the meantime
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
            raise
        return str(found.experiment_id)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode()


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value, MAX_TAG_CHARS) for key, value in tags.items()}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
