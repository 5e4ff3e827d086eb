"""Nights under a real Prefect server and real process workers: killed, missed, overlapping, and with nothing to do.

The pipeline counts tensors and releases the model; it writes down when each step begins and ends, and can be held up.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from orchestrator.journal import Journal
from orchestrator.presence import FLOW_RUN, RUN, enter, look
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

PIPELINE = "night"
PLUGIN = '''
from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from orchestrator.api import Evaluator, Stage, hookimpl

ORCHESTRATOR_API = ">=1.0,<2"


class Count(Evaluator):
    """Counts tensors, and writes down when."""

    stage: ClassVar[Stage] = Stage.VALIDATE
    name: ClassVar[str] = "count"
    paper: ClassVar[str] = "counting"
    metrics: ClassVar[Mapping[str, str]] = {"tensors": "tensors"}
    label: str = Field("count", description="What to write.")

    def measure(self, candidate: Any, baseline: Any, context: Any) -> Mapping[str, float]:
        folder = Path(os.environ["ORCHESTRATOR_TESTS"])
        self.write(folder, "begin")
        while (folder / f"hold-{self.label}").exists():
            time.sleep(0.05)
        self.write(folder, "end")
        return {"tensors": len(candidate.tensors)}

    def write(self, folder: Path, what: str) -> None:
        with (folder / "log").open("a") as log:
            log.write(f"{what} {self.label}\\n")


@hookimpl
def register_methods() -> list[type[Count]]:
    return [Count]
'''
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 16,
}


# A server, and nights -----------------------------------------------------------------------------------------------


@dataclass
class Nights:
    """The edited deployments on a server; workers come and go."""

    place: Workplace
    url: str
    api: Any
    spec: Path
    worker: subprocess.Popen[Any] | None = None
    log: Path = Path()
    _stack: ExitStack = field(default_factory=ExitStack)
    _workers: int = 0

    def start_worker(self, **environment: str) -> None:
        self._workers += 1
        known = {**self.place.with_prefect_home, **environment}
        known = {name: value for name, value in known.items() if value}
        self.worker, self.log = self._stack.enter_context(
            process_worker(known, self.place.folder, self.url, f"worker-{self._workers}")
        )

    def stop_worker(self) -> None:
        self._stack.close()
        self.worker = None

    def run(self, deployment: str, **parameters: Any) -> Any:
        found = self.api.read_deployment_by_name(f"compress/{deployment}")
        return self.api.create_flow_run_from_deployment(found.id, parameters={**found.parameters, **parameters})

    def runs(self) -> list[Any]:
        """All runs of the nightly deployment, in the order of their making."""
        found = self.api.read_deployment_by_name("compress/nightly")
        runs = [run for run in self.api.read_flow_runs() if run.deployment_id == found.id]
        return sorted(runs, key=lambda run: run.created)

    def nights(self) -> list[Any]:
        """Those that the schedule made, and that are not over."""
        runs = [run for run in self.runs() if run.auto_scheduled and run.state.is_scheduled()]
        return sorted(runs, key=lambda run: run.expected_start_time)

    def wait(self, what: Callable[[], Any]) -> Any:
        if self.worker:
            return wait_for(what, self.worker, self.log)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if (found := what()) is not None:
                return found
            time.sleep(0.2)
        pytest.fail("it did not happen")

    def begun(self, run: Any, label: str) -> None:
        """Wait until a step of the run is at work."""

        def at_work() -> bool | None:
            state = self.api.read_flow_run(run.id).state
            assert not state.is_final(), state
            return f"begin {label}" in self.steps() or None

        self.wait(at_work)

    def ended(self, run: Any, name: str) -> Any:
        """Wait until a run has ended in the state of this name."""

        def over() -> Any:
            found = self.api.read_flow_run(run.id)
            return found if found.state.is_final() and found.state.name in (name, "Failed", "Completed") else None

        found = self.wait(over)
        assert found.state.name == name, f"{found.state}\n{self.log.read_text()[-3000:]}"
        return found

    def miss_nights(self) -> list[Any]:
        """Let four days go by without a worker: what the schedule has made lies in the past, and Prefect calls it late.

        Only the times in the database are changed, as nobody can wait for four days.
        """
        assert self.worker is None
        nights = self.wait(lambda: found if len(found := self.nights()) >= 3 else None)
        ids = [str(night.id) for night in nights]
        marks = ",".join("?" * len(ids))
        sets = ", ".join(
            f"{name} = strftime('%Y-%m-%d %H:%M:%S.000000', {name}, '-4 days')"
            for name in ("expected_start_time", "next_scheduled_start_time")
        )
        with closing(sqlite3.connect(self.place.folder / "prefect" / "prefect.db", timeout=60)) as database:
            changed = database.execute(f"update flow_run set {sets} where id in ({marks})", ids)
            assert changed.rowcount == len(ids)
            database.commit()

        def late() -> Any:
            found = [self.api.read_flow_run(night.id) for night in nights]
            return found if all(night.state.name == "Late" for night in found) else None

        return list(self.wait(late))

    def steps(self) -> list[str]:
        """What the steps have written down."""
        log = self.place.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def mlflow_states(self) -> list[str]:
        """The states of the pipeline's runs in MLflow, oldest first."""
        from orchestrator.tracking import connect

        api = connect(self.place.settings.tracking_uri)
        found = api.search_runs([api.get_experiment_by_name("orchestrator").experiment_id])
        assert {run.info.status for run in found if "mlflow.parentRunId" in run.data.tags} <= {"FINISHED"}
        parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        return [run.info.status for run in sorted(parents, key=lambda run: run.info.start_time)]

    def versions(self) -> list[str]:
        """The versions in the registry, and that there are as many releases."""
        from orchestrator.tracking import connect

        found = connect(self.place.settings.tracking_uri).search_model_versions(f"name = '{PIPELINE}'")
        releases = self.place.home / "releases" / PIPELINE
        assert len(list(releases.glob("*/COMPLETE"))) == len(found)
        return sorted(str(version.version) for version in found)

    def events(self, run: Any) -> list[dict[str, Any]]:
        """The journal of a flow run."""
        return Journal(self.place.home, run.name.removeprefix(f"{PIPELINE}-")).events()

    def places_taken(self) -> int:
        return int(self.api.read_deployment_by_name("compress/nightly").global_concurrency_limit.active_slots)


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    place = Workplace(tmp_path_factory.mktemp("nights"))
    place.home = place.folder / ".orchestrator"  # also where a worker without ORCHESTRATOR_HOME looks
    place.environment |= {
        "ORCHESTRATOR_HOME": str(place.home),
        "ORCHESTRATOR_TESTS": str(place.folder),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    (place.plugins / "tensor_counter.py").write_text(PLUGIN)
    (place.folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    spec = place.folder / "night.yaml"
    steps: list[dict[str, Any]] = [{"validate": "count", "with": {"label": label}} for label in ("first", "second")]
    steps.append({"register": "release", "with": {"alias": "candidate"}})
    spec.write_text(yaml.safe_dump({"version": 1, "name": PIPELINE, "model": {"id": "model"}, "steps": steps}))
    file = place.folder / "prefect.yaml"
    deployments = yaml.safe_load(DEPLOYMENTS.read_text())
    needed = {one["name"]: one for one in deployments["deployments"] if one["name"] in ("compress", "nightly", "heal")}
    deployments["deployments"] = list(needed.values())
    nightly = needed["nightly"]
    nightly["parameters"]["spec"] = spec.name
    nightly["schedules"][0] |= {"active": True, "cron": f"0 {(datetime.now(UTC).hour + 12) % 24} * * *"}
    file.write_text(yaml.safe_dump(deployments))
    with prefect_server(place.with_prefect_home, place.folder) as url, client(url) as api:
        found = Nights(place, url, api, spec)
        found.wait(lambda: _pool(api))
        deploy(place.with_prefect_home, place.folder, url, file)
        try:
            yield found
        finally:
            found.stop_worker()


def _pool(api: Any) -> bool:
    from prefect.client.schemas.actions import WorkPoolCreate

    api.create_work_pool(WorkPoolCreate(name="compression", type="process"))
    return True


def test_nights_are_missed_killed_refused_and_have_nothing_to_do(nights: Nights) -> None:
    """One story, since each worker and flow run costs seconds."""
    hold = nights.place.folder / "hold-second"
    hold.touch()
    nights.start_worker()
    killed = nights.run("nightly")
    nights.begun(killed, "second")

    # An overlap is refused with the reason: by Prefect's limit, and by our lease where that does not apply.
    refused = nights.ended(nights.run("nightly"), "Refused")
    assert refused.run_count == 0
    killed = nights.api.read_flow_run(killed.id)
    for said in (killed.name, str(killed.id), "still at work, since 20", "process ", "prefect flow-run cancel"):
        assert said in refused.state.message
    refused = nights.ended(nights.run("compress", spec=str(nights.spec), overlap="refuse"), "Refused")
    assert f"{PIPELINE} is at work already: {killed.name.removeprefix('night-')}, of " in refused.state.message
    assert "let it end, or stop it, then run again" in refused.state.message
    assert nights.api.read_flow_run(killed.id).state.is_running()  # which the second has not healed away
    assert nights.steps() == ["begin first", "end first", "begin second"]

    # Killed, with its worker, in the middle of a step; then nights are missed.
    (at_work,) = [seen for seen in look(nights.place.home, RUN) if seen.alive]
    assert nights.worker
    os.kill(nights.worker.pid, signal.SIGKILL)
    os.kill(at_work.facts["pid"], signal.SIGKILL)
    nights.stop_worker()
    nights.wait(lambda: None if any(seen.alive for seen in look(nights.place.home, RUN)) else True)
    assert nights.api.read_flow_run(killed.id).state.is_running() and nights.places_taken() == 1
    assert nights.mlflow_states() == ["RUNNING"]
    hold.unlink()
    before = {run.id for run in nights.runs()}
    missed = {run.id for run in nights.nights()}
    nights.start_worker()
    crashed = nights.ended(killed, "Crashed")
    assert "killed in step 2 of 3, validate count" in crashed.state.message
    assert f"process {at_work.facts['pid']} on" in crashed.state.message
    (again,) = nights.wait(lambda: [run for run in nights.runs() if "catch-up" in run.tags] or None)
    again = nights.ended(again, "Completed")
    assert {run.id for run in nights.runs()} - before - missed == {again.id}
    assert nights.steps() == ["begin first", "end first", "begin second", "begin second", "end second"]
    assert nights.mlflow_states() == ["KILLED", "FINISHED"]
    assert nights.versions() == ["1"]
    assert nights.places_taken() == 0
    assert [event["event"] for event in nights.events(crashed)][-1] == "run failed"
    assert nights.events(crashed)[-1]["kind"] == "Killed"
    assert [event["cached"] for event in nights.events(again) if event["event"] == "step finished"] == [
        True,
        False,
        False,
    ]

    # Missed nights, and other bytes at the same path: one of the nights does the work. Without ORCHESTRATOR_HOME, the
    # home is in the working folder.
    nights.stop_worker()
    model = nights.place.folder / "model" / "model.safetensors"
    times = model.stat()
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    late = nights.miss_nights()
    nights.start_worker(ORCHESTRATOR_HOME="")
    worked = [nights.wait(lambda run=run: _over(nights, run)) for run in late]
    done = [run for run in worked if run.run_count]
    assert [run.state.name for run in done] == ["Completed"]
    others = [run for run in worked if not run.run_count]
    for run in others:
        run = nights.ended(run, "Superseded")
        assert f"superseded by the night of {done[0].expected_start_time:%Y-%m-%d %H:%M} UTC" in run.state.message
    assert len(others) == len(late) - 1 >= 2
    assert nights.steps()[5:] == ["begin first", "end first", "begin second", "end second"]
    assert nights.versions() == ["1", "2"]
    assert "as ORCHESTRATOR_HOME is not set" in nights.log.read_text()

    # Nothing has changed: nothing is done.
    known = nights.mlflow_states(), nights.versions(), nights.steps()
    idle = nights.ended(nights.run("nightly"), "Unchanged")
    assert idle.state.is_completed()
    assert idle.state.message == "nothing has changed: all 3 steps are in the store, nothing was released"
    assert (nights.mlflow_states(), nights.versions(), nights.steps()) == known
    assert nights.events(idle)[-1]["unchanged"] is True

    # A night whose specification is gone says what to do.
    failed = nights.ended(nights.run("nightly", spec="gone.yaml"), "Failed")
    assert str(nights.place.folder / "gone.yaml") in failed.state.message and "Traceback" not in failed.state.message
    assert not [seen for seen in look(nights.place.home, RUN) if not seen.alive]


def test_a_run_that_never_began_is_started_once_more_and_the_place_of_a_run_at_work_is_kept(nights: Nights) -> None:
    import asyncio
    import logging

    from prefect.client.orchestration import PrefectClient
    from prefect.states import Pending, Running

    from orchestrator_flows.heal import heal_flow_runs, heal_never_begun, keep_places

    nights.stop_worker()
    deployment = nights.api.read_deployment_by_name("compress/nightly")
    pending = nights.api.create_flow_run_from_deployment(deployment.id, parameters={"spec": "x"}, state=Pending())
    known = {run.id for run in nights.runs()}

    async def heal(hours: int) -> list[str]:
        async with PrefectClient(api=nights.url) as api:
            me = await api.read_flow_run(pending.id)
            later = me.state.timestamp + timedelta(hours=hours)
            me = me.model_copy(update={"id": uuid4(), "state": me.state.model_copy(update={"timestamp": later})})
            return await heal_never_begun(api, me, logging.getLogger("test"))

    assert asyncio.run(heal(hours=0)) == []
    assert asyncio.run(heal(hours=1)) == [str(pending.id)]
    assert asyncio.run(heal(hours=1)) == []
    assert "it never began" in nights.ended(pending, "Crashed").state.message
    (again,) = [run for run in nights.runs() if run.id not in known]
    assert again.parameters == pending.parameters == {"spec": "x", "overlap": "refuse"}
    assert "catch-up" in again.tags

    # Whoever heals restores the places of all who are at work, and forgets what no server knows any more after a week.
    at_work = nights.api.create_flow_run_from_deployment(deployment.id, parameters={"spec": "y"}, state=Running())
    present = enter(nights.place.home, FLOW_RUN, str(at_work.id), api="", deployed=True)  # of the server asked
    enter(nights.place.home, FLOW_RUN, str(uuid4()), api="http://127.0.0.1:9/api").give_up()

    async def heal_elsewhere() -> None:
        async with PrefectClient(api=nights.url) as api:
            logger = logging.getLogger("test")
            assert await heal_flow_runs(api, nights.place.home, datetime.now(UTC), logger) == []
            await keep_places(api, nights.place.home)

    assert nights.places_taken() == 0
    asyncio.run(heal_elsewhere())
    assert nights.places_taken() == 1
    (killed,) = [seen for seen in look(nights.place.home, FLOW_RUN) if not seen.alive]
    killed.path.write_text(json.dumps({**killed.facts, "since": time.time() - 8 * 86400}))
    asyncio.run(heal_elsewhere())
    assert [seen.name for seen in look(nights.place.home, FLOW_RUN)] == [str(at_work.id)]
    present.leave()


def _over(nights: Nights, run: Any) -> Any:
    found = nights.api.read_flow_run(run.id)
    told = found.state.name != "Cancelled"  # which is what Prefect says before it is told why
    return found if found.state.is_final() and told else None
