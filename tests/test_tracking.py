"""Runs in MLflow, in a real sqlite database and through a real tracking server."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracking
from orchestrator.addresses import without_password
from orchestrator.errors import PreflightError, StepError
from orchestrator.home import Settings
from orchestrator.registry import DIGEST_TAG, ModelRegistry
from orchestrator.tracking import Tracker, connect, translated
from tests.mlflow_server import make_database, serve_mlflow

MANIFEST = {"method": "wanda", "parameters": {"pattern": "2:4", "note": "x" * 9000}, "outputs": ["abc"]}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_database(tmp_path_factory.mktemp("mlflow") / "home")


def record(tracker: Tracker) -> tuple[str, str]:
    parent = tracker.start_pipeline("tiny", {"seed": 7, "steps": ["prune"], "text": "plain"}, {"spec": "tiny.yaml"})
    child = tracker.log_step(
        parent,
        name="prune: wanda",
        params={"pattern": "2:4", "sparsity": 0.5, "long": "y" * 7000},
        metrics={"seconds": 1.5, "layers/zeros": 0.5},
        tags={"orchestrator.fingerprint": "f" * 64},
        manifest=MANIFEST,
        started_ms=1_700_000_000_000,
        ended_ms=1_700_000_001_500,
        status="FINISHED",
    )
    tracker.finish_pipeline(parent, "FINISHED", {"perplexity": 12.25}, "| dense | compressed |\n|--|--|\n| 1 | 2 |")
    return parent, child


def read_artifact(uri: str, run_id: str, name: str, folder: Path) -> str:
    return Path(connect(uri).download_artifacts(run_id, name, str(folder))).read_text(encoding="utf-8")


def check_recorded(uri: str, parent: str, child: str, folder: Path) -> None:
    top, step = connect(uri).get_run(parent), connect(uri).get_run(child)
    assert top.data.params == {"seed": "7", "steps": '["prune"]', "text": "plain"}
    assert (top.info.status, top.info.run_name, top.data.metrics) == ("FINISHED", "tiny", {"perplexity": 12.25})
    assert top.data.tags["spec"] == "tiny.yaml"
    assert top.data.tags["mlflow.note.content"].startswith("| dense |")
    assert read_artifact(uri, parent, "metrics.md", folder).startswith("| dense |")
    assert step.data.tags["mlflow.parentRunId"] == parent
    assert step.data.tags["orchestrator.fingerprint"] == "f" * 64
    assert (step.info.status, step.info.run_name) == ("FINISHED", "prune: wanda")
    assert (step.info.start_time, step.info.end_time) == (1_700_000_000_000, 1_700_000_001_500)
    assert step.data.metrics == {"seconds": 1.5, "layers/zeros": 0.5}
    assert step.data.params["pattern"] == "2:4"
    assert step.data.params["long"] == "y" * 5999 + "…"
    assert json.loads(read_artifact(uri, child, "manifest.json", folder)) == MANIFEST


def test_a_pipeline_is_a_tree_of_runs_in_sqlite(database: str, tmp_path: Path) -> None:
    tracker = Tracker(database, "trees")
    tracker.check()
    parent, child = record(tracker)
    check_recorded(database, parent, child, tmp_path)
    found = connect(database).get_run(child).info.artifact_uri
    home = Path(database.removeprefix("sqlite:///")).parent
    assert found.startswith((home / "mlartifacts").as_uri())


def test_many_parameters_and_metrics_go_in_batches(database: str) -> None:
    tracker = Tracker(database, "batches")
    params = {f"p{index}": index for index in range(250)}
    run_id = tracker.start_pipeline("many", params, {})
    tracker.finish_pipeline(run_id, "FAILED", {f"m{index}": float(index) for index in range(1100)}, None)
    run = connect(database).get_run(run_id)
    assert run.data.params == {key: str(value) for key, value in params.items()}
    assert (len(run.data.metrics), run.data.metrics["m1099"]) == (1100, 1099.0)
    assert run.info.status == "FAILED"


def test_threads_may_record_at_once(database: str) -> None:
    tracker = Tracker(database, "threads")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: record(tracker), range(4)))
    assert len({run_id for pair in made for run_id in pair}) == 8
    for parent, child in made:
        assert connect(database).get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_a_step_that_cannot_be_recorded_whole_is_not_shown_as_finished(database: str) -> None:
    tracker = Tracker(database, "broken")
    parent = tracker.start_pipeline("tiny", {}, {})
    step: dict[str, Any] = {"params": {}, "metrics": {"not/a%name": 1.0}, "tags": {}, "manifest": {}}
    with pytest.raises(StepError, match="could not record the step 'prune'"):
        tracker.log_step(parent, name="prune", **step, started_ms=1, ended_ms=2, status="FINISHED")
    experiment = connect(database).get_experiment_by_name("broken").experiment_id
    shown = connect(database).search_runs([experiment], "attributes.run_name = 'prune'")
    assert [run.info.status for run in shown] == ["FAILED"]


def test_a_first_run_is_silent_and_writes_only_beside_its_database(tmp_path: Path) -> None:
    """In a process of its own: a new schema, then a run; nothing on the terminal, nothing in the working folder."""
    (tmp_path / "cwd").mkdir()
    code = (
        "import sys, orchestrator.tracking as t\n"
        "assert 'mlflow' not in sys.modules\n"
        "tracker = t.Tracker(sys.argv[1], 'first'); tracker.check()\n"
        "tracker.finish_pipeline(tracker.start_pipeline('p', {}, {}), 'FINISHED', {}, 'table')\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "DO_NOT"))}
    done = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{tmp_path}/home/mlflow.db"],
        cwd=tmp_path / "cwd",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "cwd").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]


def test_a_server_keeps_runs_and_versions_and_its_loss_is_noticed(
    database: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_mlflow(database, tmp_path) as server:
        tracker = Tracker(server, "served")
        tracker.check()
        parent, child = record(tracker)
        check_recorded(server, parent, child, tmp_path)
        registry = ModelRegistry(server)
        release: dict[str, Any] = {"run_id": parent, "tags": {DIGEST_TAG: "d1"}, "description": "first"}
        local = (tmp_path / "releases" / "tiny" / "d1").as_uri()
        assert registry.register("tiny-served", source=local, alias="candidate", **release) == "1"
        assert registry.register("tiny-served", source=local, alias="candidate", **release) == "1"
        assert registry.register("tiny-served", source="s3://bucket/tiny/d1", alias="remote", **release) == "2"
        assert registry.resolve("models:/tiny-served@candidate").source == local
        assert registry.resolve("models:/tiny-served/2").source == "s3://bucket/tiny/d1"
        assert capfd.readouterr() == ("", "")
    with pytest.raises(PreflightError, match="cannot be reached"):
        tracker.check()


def refused(uri: str) -> str:
    started = time.monotonic()
    with pytest.raises(PreflightError) as caught:
        Tracker(uri, "any").check()
    assert time.monotonic() - started < 20
    return str(caught.value)


def test_a_server_that_is_not_there_is_found_quickly() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        message = refused(f"http://alice:secret@127.0.0.1:{port}")
    assert f"MLflow cannot be reached at http://127.0.0.1:{port}: " in message
    assert "MLFLOW_TRACKING_URI" in message
    assert "secret" not in message


def test_a_server_that_never_answers_is_found_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.PROBE_SECONDS <= 10
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "timed out" in refused(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"HTTP/1.1 two hundred\r\n\r\n", b""])
def test_a_port_that_does_not_speak_http_is_refused(answer: bytes) -> None:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        port.listen()

        def greet() -> None:
            client, _ = port.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            message = refused(f"http://127.0.0.1:{port.getsockname()[1]}")
        finally:
            thread.join()
    assert message.startswith("MLflow cannot be reached at http://127.0.0.1:") and "MLFLOW_TRACKING_URI" in message


@pytest.mark.parametrize("uri", ["http://a b/", "http://[::1", "http://127.0.0.1/a b", "http://"])
def test_a_malformed_address_is_refused(uri: str) -> None:
    assert "MLFLOW_TRACKING_URI" in refused(uri)


def test_a_full_disk_is_not_blamed_on_the_address(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("PRAGMA max_page_count = 1")  # sqlite says the same of a full disk
        with pytest.raises(PreflightError) as by_sqlite, translated(uri, PreflightError, "cannot be used"):
            connection.execute("CREATE TABLE t (x)")
    with pytest.raises(StepError) as by_disk, translated(uri, StepError, "could not record"):
        Path("/dev/full").write_bytes(b"x")
    for message in (str(by_sqlite.value), str(by_disk.value)):
        assert message.startswith(f"the disk is full on which MLflow at {uri} writes; free")


def test_a_server_that_is_no_mlflow_is_refused(s3_endpoint: str) -> None:
    assert "cannot be used" in refused(s3_endpoint)


@pytest.mark.parametrize("uri", ["mlruns", "file:./mlruns", "databricks", "http://127.0.0.1:port"])
def test_what_is_no_tracking_address_is_refused(uri: str) -> None:
    assert "MLFLOW_TRACKING_URI" in refused(uri)


def test_a_database_without_its_driver_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as database:
        message = refused(f"postgresql+nonsense://u:secret@127.0.0.1:{database.getsockname()[1]}/mlflow")
    assert message.startswith("the driver for MLflow's database at postgresql+nonsense://127.0.0.1:")
    assert "is not installed" in message and "psycopg2-binary" in message and "secret" not in message


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_that_would_be_lost_is_refused(uri: str) -> None:
    assert "lost with the process" in refused(uri)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    assert "file is not a database" in refused(f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be reached" in refused(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_schema_of_another_mlflow_is_refused_with_the_way_out(database: str, tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as source,
        closing(sqlite3.connect(tmp_path / "old.db")) as target,
    ):
        source.backup(target)
        target.execute("UPDATE alembic_version SET version_num = 'c48cb773bb87'")
        target.commit()
    assert "mlflow db upgrade" in refused(f"sqlite:///{tmp_path}/old.db")


def test_a_deleted_experiment_is_refused_with_the_way_out(database: str) -> None:
    Tracker(database, "deleted").check()
    connect(database).delete_experiment(connect(database).get_experiment_by_name("deleted").experiment_id)
    with pytest.raises(PreflightError, match="mlflow experiments restore"):
        Tracker(database, "deleted").check()


def test_passwords_are_not_shown() -> None:
    text = "cannot open postgresql://user:p%40ss@host/db or http://h/x"
    assert without_password(text) == "cannot open postgresql://host/db or http://h/x"
    for unquoted in ("http://user:p@ss@host:80/x", "http://user:p/@ss@host:80/x", "http://p@ss@host:80/x"):
        assert without_password(unquoted) == "http://host:80/x"
        assert Settings(Path("home"), unquoted).public_tracking_uri == "http://host:80/x"
    for secret, shown in (
        ("postgresql://h/db?user=u&password=p@/s&x=1", "postgresql://h/db?user=…&password=…&x=…"),
        ("postgresql://bob:pw@127.0.0.1:9/db?sslpassword=s3kr1t", "postgresql://127.0.0.1:9/db?sslpassword=…"),
        ("http://h/x?token=s3.kr1t&api_key=a#b?c&PASSWORD=d", "http://h/x?token=…&api_key=…&PASSWORD=…"),
        ("(http://h/x?s3kr1t), http://h#access_token=s3kr1t.", "(http://h/x?…), http://h#access_token=…."),
        ("with url: /api/2.0?token=s3kr1t (Caused by", "with url: /api/2.0?token=… (Caused by"),
        ("what? a=b; see https://h/x#part", "what? a=b; see https://h/x#part"),
    ):
        assert without_password(secret) == shown
    message = refused("postgresql://bob:s3kr1t@127.0.0.1:9/db?sslpassword=s3kr1t&SSLPASSWORD=s3kr1t")
    assert "s3kr1t" not in message and "127.0.0.1:9/db?sslpassword=…" in message
    message = refused("http://user:p/qq@host:80/x")
    assert "qq" not in message and "is not an address" in message and "%2F" in message


def test_a_bug_of_ours_is_not_dressed_up_as_a_failure_of_mlflow(database: str) -> None:
    with pytest.raises(TypeError):
        Tracker(database, "bugs").start_pipeline("p", {"not json": object()}, {})
    with pytest.raises(ValueError, match=DIGEST_TAG):
        ModelRegistry(database).register("m", source="s3://b/m", run_id=None, tags={}, alias=None, description="")
