"""Who is at work in a home, and what becomes of runs that were killed: no server, but real processes and locks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from orchestrator.errors import OverlapError, PreflightError
from orchestrator.healing import heal_runs
from orchestrator.home import Settings
from orchestrator.journal import Journal
from orchestrator.presence import FLOW_RUN, RUN, alone, enter, look
from orchestrator.record import EXPERIMENT


def test_clocks_that_disagree_are_told_and_the_server_s_decides(home: Path) -> None:
    import asyncio
    import logging

    from prefect.client.schemas.objects import FlowRun, State, StateType

    from orchestrator_flows.heal import arrive
    from orchestrator_flows.nights import told_at

    ahead = datetime.now(UTC) + timedelta(hours=3)
    run = FlowRun(flow_id=UUID(int=0), state=State(type=StateType.RUNNING, timestamp=ahead))
    said: list[str] = []
    logger = logging.Logger("test")
    logger.addFilter(lambda record: bool(said.append(record.getMessage())))
    present = asyncio.run(arrive(None, home, run, logger))  # type: ignore[arg-type]
    assert "the clock of the Prefect server is 10800 s ahead of that of this machine" in said[0]
    assert told_at(run) == ahead
    assert [seen.name for seen in look(home, FLOW_RUN) if seen.alive] == [str(run.id)]
    present.leave()
    assert look(home, FLOW_RUN) == []


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def killed_run(home: Path, **changes: Any) -> str:
    """A run whose process was killed in its second step."""
    script = """
import os, sys, json
from pathlib import Path
from orchestrator.journal import Journal
journal = Journal(Path(sys.argv[1]))
steps = [{"stage": "prune", "method": "wanda"}, {"stage": "quantize", "method": "gptq"}]
journal.begin(pipeline="p", engine="local", steps=steps, **json.loads(sys.argv[2]))
journal.write("step finished", step=0)
journal.write("step started", step=1)
print(journal.run_id, flush=True)
os.kill(os.getpid(), 9)
"""
    process = subprocess.run(
        [sys.executable, "-c", script, str(home), json.dumps(changes)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert process.returncode == -signal.SIGKILL
    return process.stdout.strip()


def settings_of(home: Path) -> Settings:
    return Settings(home, f"sqlite:///{home / 'mlflow.db'}")


def test_a_killed_run_is_ended_in_its_journal_once(home: Path) -> None:
    run_id = killed_run(home)
    said: list[str] = []
    assert heal_runs(settings_of(home), said.append) == [run_id]
    assert heal_runs(settings_of(home), said.append) == []
    assert len(said) == 1 and "killed in step 2 of 2, quantize gptq" in said[0]
    events = [event["event"] for event in Journal(home, run_id).events()]
    assert events == ["run started", "step finished", "step started", "run failed"]
    assert not (home / "mlflow.db").exists()  # nobody had written there


def test_a_run_at_work_is_never_healed_and_one_that_ended_leaves_nothing(home: Path) -> None:
    journal = Journal(home)
    journal.begin(pipeline="p")
    assert heal_runs(settings_of(home), pytest.fail) == []
    assert [seen.alive for seen in look(home, RUN)] == [True]
    with journal.ending(whole=lambda: True):
        journal.write("run finished")
    assert look(home, RUN) == []


def test_a_run_whose_end_mlflow_was_not_told_is_ended_there_by_the_next(home: Path) -> None:
    from orchestrator.tracking import Tracker, connect

    settings = settings_of(home)
    home.mkdir()
    journal = Journal(home)
    tracker = Tracker(settings.tracking_uri, EXPERIMENT)
    run = tracker.start_pipeline("p", {}, {"orchestrator.run": journal.run_id})
    journal.begin(pipeline="p")
    with journal.ending(whole=lambda: False):
        journal.write("run failed", kind="StepError", error="MLflow was gone")
    assert [seen.alive for seen in look(home, RUN)] == [False]
    assert heal_runs(settings, pytest.fail) == [journal.run_id]
    assert connect(settings.tracking_uri).get_run(run).info.status == "FAILED"
    assert [event["event"] for event in journal.events()] == ["run started", "run failed"]


def test_a_run_of_another_machine_is_left_alone_unless_asked(home: Path) -> None:
    run_id = killed_run(home)
    (path,) = (home / "locks").glob("run-*")
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
    said: list[str] = []
    assert heal_runs(settings_of(home), said.append) == []
    (told,) = said
    assert told.startswith(f"left alone: {run_id}, of ") and "on elsewhere, process" in told
    assert "--param other_machines=true" in told
    assert heal_runs(settings_of(home), said.append, other_machines=True) == [run_id]


def test_a_run_that_began_at_another_mlflow_is_told_for_a_week(home: Path) -> None:
    run_id = killed_run(home, tracking="http://mlflow.before:5000")
    for _ in range(2):
        said: list[str] = []
        assert heal_runs(settings_of(home), said.append) == []
        assert f"the MLflow run of {run_id} stays open at http://mlflow.before:5000, where it began" in said[-1]
    assert [event["event"] for event in Journal(home, run_id).events()].count("run failed") == 1
    grow_old(home)
    assert heal_runs(settings_of(home), pytest.fail) == [run_id]
    assert look(home, RUN) == []


def grow_old(home: Path) -> None:
    """Let those who were killed have come eight days ago."""
    for path in (home / "locks").glob("*run-*"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({**facts, "since": facts["since"] - 8 * 86400}))


def test_a_full_disk_is_told_with_the_home_and_leaves_no_file(home: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    present = enter(home, FLOW_RUN, "before")
    present.leave()
    journal = Journal(home)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))  # as a quota: no file may grow
        with pytest.raises(PreflightError, match=f"the home folder {home} takes no files: File too large; see to"):
            enter(home, FLOW_RUN, "late")
        with pytest.raises(PreflightError, match="takes no files"):
            journal.begin(pipeline="p")
        assert list((home / "locks").iterdir()) == []
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        journal.begin(pipeline="p")
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
        with pytest.raises(PreflightError, match="takes no files"), journal.ending(whole=lambda: True):
            journal.write("run finished")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert heal_runs(settings_of(home), lambda _: None) == [journal.run_id]


def test_what_others_left_while_they_came_is_swept(home: Path) -> None:
    (home / "locks").mkdir(parents=True)
    old, new, lease = (home / "locks" / name for name in (".flow-run-0", ".run-1", "0123"))
    for path in (old, new, lease):
        path.touch()
    for path in (old, lease):
        os.utime(path, (0, 0))
    enter(home, RUN, "me").leave()
    assert sorted((home / "locks").iterdir()) == sorted([new, lease])


def test_a_journal_from_the_future_stays_in_order(home: Path) -> None:
    ahead = time.time() + 86400
    run_id = killed_run(home, time=ahead)
    assert heal_runs(settings_of(home), lambda _: None) == [run_id]
    events = Journal(home, run_id).events()
    assert events[-1]["event"] == "run failed" and events[-1]["time"] == max(event["time"] for event in events) >= ahead


def test_whoever_is_alone_is_refused_beside_others_and_others_are_not_stopped(home: Path) -> None:
    with alone(home, "p"):
        flow_run = enter(home, FLOW_RUN, "mine", pipeline="p")
        with pytest.raises(OverlapError, match="p is at work already") as caught, alone(home, "p"):
            pass
        assert caught.value.exit_code == 3
        with alone(home, "q"):
            pass
    flow_run.leave()
    journal = Journal(home)
    journal.begin(pipeline="p")
    with (
        pytest.raises(OverlapError, match=f"p is at work already: {journal.run_id}, of .*, since 20"),
        alone(home, "p"),
    ):
        pass
    with journal.ending(whole=lambda: True):
        pass
    with alone(home, "p"):
        pass


def test_files_that_are_not_ours_stop_nobody(home: Path) -> None:
    (home / "locks").mkdir(parents=True)
    (home / "locks" / "run-x.1").write_text("no json")
    (home / "locks" / "run-x.2").write_text("[]")
    (home / "locks" / "run-x.3").mkdir()
    assert look(home, RUN) == []
    assert heal_runs(settings_of(home), pytest.fail) == []


PRINTS_ON = """
import logging, sys
from prefect.logging.configuration import setup_logging
from orchestrator_flows.output import outlive_reader
setup_logging()
if sys.argv[2] == "outlives":
    outlive_reader()
logging.getLogger("prefect").warning("at work")
sys.stdin.readline()
try:
    for message in range(100):
        logging.getLogger("prefect").warning("still at work")
        print(message, flush=True)
    how = "whole"
except BaseException as error:
    how = type(error).__name__
with open(sys.argv[1], "w") as said:
    said.write(how)
"""


@pytest.mark.parametrize(("what", "ends"), [("outlives", "whole"), ("does not", "SystemExit")])
def test_a_flow_outlives_the_worker_that_reads_what_it_prints(tmp_path: Path, what: str, ends: str) -> None:
    said = tmp_path / "said"
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS_ON, str(said), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
    )
    assert process.stdin and process.stdout and process.stderr
    assert b"at work" in process.stderr.readline()
    process.stdout.close()  # as the kernel does for a worker that is killed
    process.stderr.close()
    process.stdin.close()
    process.wait()
    assert said.read_text() == ends
