"""Ending what `kill -9` left open: the journal and the MLflow runs of runs whose process is gone.

What proves that nobody is at work is the kernel's lock of a run (`presence`), never a clock. Finished steps are in the
store, and the next run of the same specification goes on where the killed one was; this only says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import OrchestratorError, StepError
from orchestrator.home import Settings
from orchestrator.journal import Journal
from orchestrator.presence import RUN, Seen, look
from orchestrator.record import EXPERIMENT
from orchestrator.tracking import PARENT_RUN_TAG, connect, sqlite_path, translated

KILLED = "Killed"
ERROR_TAG = "orchestrator.error"


def heal_runs(settings: Settings, say: Callable[[str], None], *, other_machines: bool = False) -> list[str]:
    """End the journals and MLflow runs of killed runs; return their ids, and say what was done.

    other_machines: also of runs that another machine began. Only where locks of the home's file system reach all
    machines, or the other one is gone: otherwise a run that is at work there would be ended here.
    """
    healed = []
    for seen in look(settings.home, RUN):
        if seen.alive:
            continue
        if not (seen.here or other_machines):
            say(left_alone(seen))
            continue
        with seen.taken() as taken:
            if taken and _heal(settings, seen, say):
                healed.append(seen.name)
    return healed


def left_alone(seen: Seen) -> str:
    """Why nothing is done about somebody of another machine, and what to do."""
    return (
        f"left alone: {seen}; whether it is at work cannot be told from here. If that machine is gone: "
        "prefect deployment run heal/heal --param other_machines=true"
    )


def where_it_was(home: Path, run_id: str) -> str:
    """How far a killed run got, from its journal; "" if that does not say."""
    events = [event for event in Journal(home, run_id).events() if isinstance(event, dict)]
    steps = next((event.get("steps", ()) for event in events if event.get("event") == "run started"), ())
    finished = {event.get("step") for event in events if event.get("event") == "step finished"}
    begun = [event["step"] for event in events if event.get("event") == "step started"]
    if not steps:
        return ""
    if begun and begun[-1] not in finished:
        step = steps[begun[-1]]
        return f"in step {begun[-1] + 1} of {len(steps)}, {step['stage']} {step['method']}"
    return f"after {len(finished)} of {len(steps)} steps"


def _heal(settings: Settings, seen: Seen, say: Callable[[str], None]) -> bool:
    """Whether nothing is left to heal. What MLflow does not take now, it is told the next time."""
    journal = Journal(settings.home, seen.name)
    events = journal.events()
    ended = next((event["event"] for event in events if event.get("event") in ("run finished", "run failed")), None)
    if ended is None and events:
        last = max(event.get("time", 0.0) for event in events)
        reason = f"killed {where_it_was(settings.home, seen.name)}: its process {seen.facts.get('pid')} is gone"
        # A clock that was set back does not make the end come before the rest.
        journal.write("run failed", kind=KILLED, error=reason, **({"time": last} if last > time.time() else {}))
        say(f"run {seen.name} was {reason}; its finished steps are kept")
    try:
        elsewhere = _other_tracking(settings, seen)
        if elsewhere and not seen.long_gone:
            say(
                f"the MLflow run of {seen.name} stays open at {elsewhere}, where it began: MLFLOW_TRACKING_URI is "
                f"{settings.public_tracking_uri} now. A run with the old address ends it; this is said for a week"
            )
            return False
        _end_in_mlflow(settings, seen.name, {"run finished": "FINISHED", "run failed": "FAILED"}.get(ended or "", ""))
    except OrchestratorError as error:
        say(f"the MLflow run of {seen.name} stays open for now: {error}")
        return False
    seen.forget()
    return True


def _other_tracking(settings: Settings, seen: Seen) -> str:
    """Where the MLflow of a run is, if it is not today's; "" if it is, or if its database has gone or was moved."""
    began = str(seen.facts.get("tracking") or settings.public_tracking_uri)
    moved = began.startswith("sqlite") and not sqlite_path(began).exists()
    return "" if moved or began == settings.public_tracking_uri else began


def _end_in_mlflow(settings: Settings, run_id: str, ended: str) -> None:
    """Close what is RUNNING of a run in MLflow: as it ended, or as KILLED."""
    uri = settings.tracking_uri
    if uri.startswith("sqlite") and not sqlite_path(uri).exists():
        return
    with translated(uri, StepError, f"could not end the run {run_id}"):
        client = connect(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return

        def running(tag: str, value: str) -> list[str]:
            asked = f"tags.`{tag}` = '{value}' and attributes.status = 'RUNNING'"
            return [run.info.run_id for run in client.search_runs([experiment.experiment_id], asked)]

        for parent in running("orchestrator.run", run_id):
            for child in running(PARENT_RUN_TAG, parent):
                client.set_terminated(child, "KILLED")
            if not ended:
                client.set_tag(parent, ERROR_TAG, "its process was killed")
            client.set_terminated(parent, ended or "KILLED")
