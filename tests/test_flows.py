"""Runs under Prefect: with the embedded server, against a real server, and deployed to a real worker.

The pipeline is a throw-away plugin that counts tensors, so that what is tested is Prefect's side.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import GateError, OrchestratorError, PreflightError, StepError
from tests.prefect_server import (
    DEPLOYMENTS,
    PATIENCE_SECONDS,
    Workplace,
    client,
    deploy,
    prefect_server,
    process_worker,
    wait_for,
)
from tests.promotion_scene import Scene


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("flows"))
    yield place
    for server in place.servers():
        os.kill(server, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(workplace: Workplace) -> Iterator[str]:
    """The address of a real Prefect server."""
    with prefect_server(workplace.with_prefect_home, workplace.folder) as url:
        yield url


@pytest.fixture
def run_here(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path, str], tuple[dict[str, Any], Recorder]]]:
    """Call the engine in this process, with the given PREFECT_API_URL."""
    monkeypatch.syspath_prepend(str(workplace.plugins))
    for name in ("HOME", "MLFLOW_TRACKING_URI", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, workplace.environment[name])
    monkeypatch.setenv("PREFECT_HOME", str(workplace.folder / "prefect"))

    def run(spec: Path, url: str) -> tuple[dict[str, Any], Recorder]:
        from orchestrator_flows import engine

        monkeypatch.setenv("PREFECT_API_URL", url)
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
        recorder = Recorder()
        return engine.run(spec, workplace.settings, recorder), recorder

    yield run
    monkeypatch.undo()
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.finished: list[str] = []
        self.notes: list[str] = []

    def run_started(self, run_id: str, plan: Any) -> None: ...

    def step_started(self, step: Any) -> None: ...

    def step_progress(self, step: Any, fraction: float, message: str) -> None: ...

    def step_finished(self, step: Any, outcome: Any) -> None:
        self.finished.append(step.label)

    def note(self, message: str) -> None:
        self.notes.append(message)


def flow_runs(url: str, name_prefix: str) -> list[Any]:
    with client(url) as api:
        return [run for run in api.read_flow_runs() if run.name.startswith(name_prefix)]


def task_runs(url: str, flow_run_id: Any) -> list[Any]:
    """The task runs of a flow run, once the server has recorded their end, which it does with a delay."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    deadline = time.monotonic() + PATIENCE_SECONDS
    with client(url) as api:
        while True:
            runs = api.read_task_runs(flow_run_filter=only)
            if (len(runs) == 2 and all(run.state.is_final() for run in runs)) or time.monotonic() > deadline:
                return sorted(runs, key=lambda run: run.start_time)
            time.sleep(0.2)


# With the embedded server -------------------------------------------------------------------------------------------


def test_a_run_with_the_embedded_server_is_recorded_and_leaves_neither_noise_nor_processes(
    workplace: Workplace,
) -> None:
    spec = workplace.spec("Counted_twice")
    process = workplace.command_line("run", str(spec), "--json")
    stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, stderr
    assert workplace.servers() == []
    document = json.loads(stdout)
    assert [step["metrics"]["tensors"] for step in document["steps"]] == [1, 1]
    for noise in ("Traceback", "prefect.", "| INFO", "| ERROR", "sqlalchemy"):
        assert noise not in stderr

    name = f"Counted_twice-{document['run']}"
    assert workplace.query("select name, state_type, parameters from flow_run") == [
        (name, "COMPLETED", json.dumps({"spec": str(spec), "overlap": "wait"}))
    ]
    tasks = workplace.query("select name, state_type, tags, cache_key from task_run")
    assert tasks == [("validate count", "COMPLETED", '["validate"]', None)] * 2
    tables = workplace.query("select key, data from artifact where type = 'table'")
    assert [key for key, _ in tables] == ["counted-twice-metrics"]
    assert json.loads(json.loads(tables[0][1])) == [{"metric": "tensors", "dense": "1", "compressed": "1", "ratio": ""}]
    (note,) = workplace.query("select key, data from artifact where type = 'markdown'")
    assert note[0] == "counted-twice-report" and Path(document["report"]).as_uri() in note[1]
    assert Path(document["report"]).read_text().startswith("<!doctype html>")
    messages = [message for (message,) in workplace.query("select message from log")]
    assert any(document["steps"][1]["artifact"]["digest"][:12] in message for message in messages)
    results = [json.loads(path.read_text()) for path in (workplace.home / "prefect" / "storage").iterdir()]
    assert document in results  # and every result is JSON


def test_ctrl_c_ends_step_and_server_at_once_and_is_recorded(workplace: Workplace) -> None:
    process = start_slow_run(workplace, "interrupted")
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert workplace.servers() == []
    states = workplace.query("select state_type from flow_run where name like 'interrupted-%'")
    assert states == [("CRASHED",)]
    assert list((workplace.home / "staging").iterdir()) == []


def test_the_embedded_server_ends_when_its_parent_is_killed(workplace: Workplace) -> None:
    script = """
import time
from orchestrator_flows.server import embedded_server
with embedded_server() as server:
    server.wait(600)
    print("ready", flush=True)
    time.sleep(3600)
"""
    environment = {**workplace.environment, "PREFECT_HOME": str(workplace.home / "prefect")}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, cwd=workplace.folder, stdout=subprocess.PIPE
    )
    assert parent.stdout and parent.stdout.readline() == b"ready\n"
    assert len(workplace.servers()) == 1
    parent.kill()
    parent.communicate(timeout=PATIENCE_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while workplace.servers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workplace.servers() == []


def start_slow_run(workplace: Workplace, name: str) -> subprocess.Popen[str]:
    """Start a run whose last step takes for ever, and wait until it computes."""
    spec = workplace.spec(name, {"with": {"seconds": 3600.0}})
    process = workplace.command_line("run", str(spec))
    assert process.stderr
    for line in process.stderr:
        if line.startswith("2/2"):
            time.sleep(0.5)
            return process
    pytest.fail(f"the run ended: {process.wait()}")


def test_an_embedded_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator_flows.server import embedded_server

    (tmp_path / "prefect.db").write_bytes(b"this is no database, " * 100)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with pytest.raises(PreflightError, match="file is not a database") as caught, embedded_server() as server:
        server.wait(PATIENCE_SECONDS)
    assert "--local" in str(caught.value)
    assert server.process.poll() is not None


# Against a server ---------------------------------------------------------------------------------------------------


def test_a_failed_step_fails_its_task_and_its_flow_and_comes_out_as_it_was_raised(
    workplace: Workplace, server: str, run_here: Any
) -> None:
    spec = workplace.spec("broken", {"with": {"broken": True}})
    with pytest.raises(StepError) as caught:
        run_here(spec, server)
    (problem,) = caught.value.problems
    assert (problem.what, problem.remedy) == ("the counter is broken", "mend it")
    assert problem.where and problem.where.startswith(f"{spec}:")
    (flow_run,) = flow_runs(server, "broken-")
    assert flow_run.state.is_failed() and "the counter is broken" in flow_run.state.message
    first, last = task_runs(server, flow_run.id)
    assert first.state.is_completed()
    assert last.state.is_failed() and "the counter is broken" in last.state.message
    assert last.run_count == 1  # no retry mends it


def test_a_violated_gate_comes_out_with_its_exit_code_and_its_numbers_are_shown(
    workplace: Workplace, server: str, run_here: Any
) -> None:
    spec = workplace.spec("gated", {"require": {"tensors": {"min": 2.0}}})
    spec.write_text(
        spec.read_text().replace("- validate: count\n", "- validate: count\n  require: {tensors: {max: 0}}\n", 1)
    )
    with pytest.raises(GateError, match="tensors is 1, max allowed is 0") as caught:
        run_here(spec, server)
    assert caught.value.exit_code == 5
    assert "tensors is 1, min allowed is 2" in str(caught.value)  # the second step has been measured too
    (flow_run,) = flow_runs(server, "gated-")
    assert flow_run.state.is_failed() and "min allowed is 2" in flow_run.state.message
    assert all(task.state.is_failed() for task in task_runs(server, flow_run.id))
    with client(server) as api:
        shown = {
            artifact.key: artifact for artifact in api.read_artifacts() if (artifact.key or "").startswith("gated-")
        }
    assert set(shown) == {"gated-metrics", "gated-report"}
    assert {artifact.flow_run_id for artifact in shown.values()} == {flow_run.id}
    assert "/runs/" in str(shown["gated-report"].data) and ".html" in str(shown["gated-report"].data)


def test_a_second_run_finds_everything_in_the_store(workplace: Workplace, server: str, run_here: Any) -> None:
    spec = workplace.spec("twice")
    run_here(spec, server)
    document, recorder = run_here(spec, server)
    assert [step["cached"] for step in document["steps"]] == [True, True]
    assert recorder.finished == ["validate count"] * 2
    assert {run.state.type.value for run in flow_runs(server, "twice-")} == {"COMPLETED"}


@pytest.mark.parametrize("answering", [False, True], ids=["refused", "silent"])
def test_an_unreachable_server_is_a_preflight_error(
    workplace: Workplace, run_here: Any, monkeypatch: pytest.MonkeyPatch, answering: bool
) -> None:
    from orchestrator_flows import server

    monkeypatch.setattr(server, "_CHECK_SECONDS", 2.0)
    spec = workplace.spec("unreachable")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not answering:
            listener.close()
        with pytest.raises(PreflightError) as caught:
            run_here(spec, f"http://user:secret@127.0.0.1:{port}/api")
    message = str(caught.value)
    assert f"http://127.0.0.1:{port}/api" in message and "secret" not in message
    assert "PREFECT_API_URL" in message and "--local" in message


def test_a_wrong_specification_is_found_before_any_server_is_asked(workplace: Workplace, run_here: Any) -> None:
    spec = workplace.spec("wrong", {"with": {"secnods": 1}})
    with pytest.raises(OrchestratorError, match="secnods") as caught:
        run_here(spec, "http://127.0.0.1:9/api")
    assert caught.value.exit_code == 2


# Deployed -----------------------------------------------------------------------------------------------------------


def test_the_deployment_file_is_what_prefect_expects() -> None:
    from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel
    from prefect.flows import load_flow_from_entrypoint

    data = yaml.safe_load(DEPLOYMENTS.read_text())
    PrefectYamlModel.model_validate(data)
    assert set(data) <= set(PrefectYamlModel.model_fields)  # the model ignores what it does not know
    names = []
    for deployment in data["deployments"]:
        assert set(deployment) <= set(DeploymentConfig.model_fields)
        flow: Any = load_flow_from_entrypoint(deployment["entrypoint"])
        assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)
        names.append(flow.name)
    assert {"compress", "promote-model", "rollback-model"} <= set(names)


def test_the_deployment_runs_on_a_process_worker(workplace: Workplace, server: str) -> None:
    environment = workplace.with_prefect_home
    with process_worker(environment, workplace.folder, server) as (process, log), client(server) as api:
        deploy(environment, workplace.folder, server)
        deployment = api.read_deployment_by_name("compress/nightly")
        assert [schedule.active for schedule in deployment.schedules] == [False]  # somebody has to want it
        deployment = api.read_deployment_by_name("compress/compress")
        spec = workplace.spec("deployed").relative_to(workplace.folder)
        created = api.create_flow_run_from_deployment(deployment.id, parameters={"spec": str(spec)})

        def completed(created: Any) -> Any:
            def ended() -> Any:
                run = api.read_flow_run(created.id)
                return run if run.state.is_final() else None

            run = wait_for(ended, process, log)
            assert run.state.is_completed(), f"{run.state}\n{log.read_text()[-3000:]}"
            return run

        run = completed(created)
        assert run.name.startswith("deployed-")
        tasks = task_runs(server, created.id)
        assert [task.name for task in tasks] == ["validate count"] * 2
        assert all(task.state.is_completed() for task in tasks)
        assert [artifact.flow_run_id for artifact in api.read_artifacts() if artifact.key == "deployed-metrics"] == [
            created.id
        ]
        scene = Scene((workplace.folder / "releases").as_uri(), workplace.folder, workplace.settings.tracking_uri)
        first, second = scene.register("one"), scene.register("two", "candidate")
        scene.promoter.promote(first, "production", force=True)
        for name, parameters, shown in (
            ("promote-model", {"version": "candidate", "to": "production", "force": True}, second),
            ("rollback-model", {"reason": "a test"}, first),
        ):
            deployment = api.read_deployment_by_name(f"{name}/{name}")
            parameters = {"model": scene.model, **parameters}
            named = completed(api.create_flow_run_from_deployment(deployment.id, parameters=parameters)).name
            assert named == f"{scene.model}-{shown}-production"
            assert scene.alias() == shown
        assert [stored.entry.kind for stored in scene.history.entries()] == ["promote", "promote", "rollback"]
    journal = workplace.home / "runs" / f"{run.name.removeprefix('deployed-')}.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert events[0]["engine"] == "prefect" and events[-1]["event"] == "run finished"
    digests = [event["digest"] for event in events if event["event"] == "step finished"]
    assert len(digests) == 2
    for digest in digests:
        assert (workplace.home / "artifacts" / digest / "manifest.json").is_file()
