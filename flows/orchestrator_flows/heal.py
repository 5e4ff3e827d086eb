"""Runs that `kill -9` left RUNNING in Prefect, and the flow that heals them and all else of killed runs.

`prefect.yaml` has it run whenever a worker starts: until then a killed run holds the place of its deployment. Every
run of `compress` heals what it finds, too.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_client, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run
from prefect.settings import get_current_settings

from orchestrator.healing import heal_runs, left_alone, where_it_was
from orchestrator.home import Settings
from orchestrator.presence import FLOW_RUN, Presence, Seen, enter, look
from orchestrator_flows.nights import keep_place, take_up_again, told_at
from orchestrator_flows.output import outlive_reader
from orchestrator_flows.server import public

Logger = logging.Logger | logging.LoggerAdapter[Any]
_CLOCK_SECONDS = 60.0
_BEGIN_WITHIN = timedelta(minutes=15)
_present: list[Presence] = []  # until the process ends: by then Prefect knows how the run ended


@flow(name="heal", persist_result=True, result_serializer="json", retries=0, validate_parameters=True)
async def heal(other_machines: bool = False) -> dict[str, Any]:
    """End what killed runs left open in the home of this worker: in Prefect, in MLflow and in their journals.

    A killed run of a deployment is started once more. other_machines: also runs that began on another machine; only
    if locks in the home reach all machines, or the other one is gone. Returns the ids of the runs.
    """
    from orchestrator_flows.pipeline import in_thread

    outlive_reader()
    logger = get_run_logger()
    settings = Settings.from_environment()
    settings.make_home()
    async with get_client() as client:
        me = await client.read_flow_run(flow_run.id)
        now = told_at(me)
        flow_runs = await heal_flow_runs(client, settings.home, now, logger, other_machines=other_machines)
        flow_runs += await heal_never_begun(client, me, logger)
        if flow_runs:
            await keep_places(client, settings.home)
    runs = await in_thread(lambda: heal_runs(settings, logger.info, other_machines=other_machines))
    return {"flow_runs": flow_runs, "runs": runs}


async def arrive(client: PrefectClient, home: Path, run: FlowRun, logger: Logger) -> Presence:
    """Let this flow run be seen at work in `home`, and heal what killed ones left RUNNING."""
    ahead = (told_at(run) - datetime.now(UTC)).total_seconds()
    if abs(ahead) > _CLOCK_SECONDS:
        logger.warning(
            "the clock of the Prefect server is %.0f s %s that of this machine; schedules follow the server's",
            abs(ahead),
            "ahead of" if ahead > 0 else "behind",
        )
    present = enter(home, FLOW_RUN, str(run.id), flow_run=run.name, api=_api(), deployed=bool(run.deployment_id))
    if run.deployment_id:
        _present.append(present)
    try:
        healed = await heal_flow_runs(client, home, told_at(run), logger)
        if healed + await heal_never_begun(client, run, logger):
            await keep_places(client, home)
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("flow runs that were killed could not be ended: %s", error)
    return present


async def heal_flow_runs(
    client: PrefectClient, home: Path, now: datetime, logger: Logger, *, other_machines: bool = False
) -> list[str]:
    """End flow runs in Prefect whose processes are gone; return their ids. now: by the Prefect server's clock."""
    found = look(home, FLOW_RUN)
    alive = {seen.name for seen in found if seen.alive}
    healed = []
    for seen in found:
        if seen.alive:
            continue
        if not (seen.here or other_machines):
            logger.warning("%s", left_alone(seen))
            continue
        with seen.taken() as taken:
            if taken and seen.name in alive:  # Prefect let it begin again
                seen.forget()
            elif taken and await _ended(client, home, seen, now, logger):
                healed.append(seen.name)
    return healed


async def keep_places(client: PrefectClient, home: Path) -> None:
    """Let every run at work in `home` have the place of its deployment, whichever was given up by healing."""
    for seen in look(home, FLOW_RUN):
        if seen.alive and seen.facts.get("deployed") and seen.facts.get("api") == _api():
            with suppress(ObjectNotFound):  # somebody has removed it from the server
                run = await client.read_flow_run(seen.name)  # type: ignore[arg-type]
                if run.state_type == StateType.RUNNING:
                    await keep_place(client, run)


async def heal_never_begun(client: PrefectClient, me: FlowRun, logger: Logger) -> list[str]:
    """End flow runs of the same work pool whose worker was killed while it started them; return their ids.

    No process of theirs could take a lock, so that here time decides: after a quarter of an hour (by the server's
    clock) Prefect has given their place to others long ago.
    """
    if not me.work_pool_name:
        return []
    pending = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING]))
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[me.work_pool_name]))
    healed = []
    for run in await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=pending), work_pool_filter=pool):
        if run.id != me.id and told_at(me) - told_at(run) > _BEGIN_WITHIN:
            message = f"it never began: whoever was to start it at {told_at(run):%Y-%m-%d %H:%M} UTC is gone"
            await client.set_flow_run_state(run.id, State(type=StateType.CRASHED, message=message))
            again = await take_up_again(client, run, told_at(me))
            logger.warning("%s (%s): %s%s", run.name, run.id, message, f"; {again.name} does" if again else "")
            healed.append(str(run.id))
    return healed


async def _ended(client: PrefectClient, home: Path, seen: Seen, now: datetime, logger: Logger) -> bool:
    """End one flow run; whether there was something to do."""
    try:
        run = await client.read_flow_run(seen.name)  # type: ignore[arg-type]
    except ObjectNotFound:
        if seen.facts.get("api") == _api() or seen.long_gone:  # another server may know it; not one that ended with it
            seen.forget()
        return False
    cancelling = run.state_type == StateType.CANCELLING
    if run.state_type not in (StateType.PENDING, StateType.RUNNING) and not cancelling:
        seen.forget()
        return False
    where = where_it_was(home, str(seen.facts.get("run", ""))) or "while it was planning"
    reason = f"killed {where}: {seen.facts.get('user')}'s process {seen.facts.get('pid')} on {seen.facts.get('host')} "
    reason += "is gone without a word; finished steps are kept"
    kind = StateType.CANCELLED if cancelling else StateType.CRASHED
    await client.set_flow_run_state(run.id, State(type=kind, message=reason))
    again = None if cancelling else await take_up_again(client, run, now)
    logger.warning("%s (%s) was %s%s", run.name, run.id, reason, f"; {again.name} takes them up" if again else "")
    seen.forget()
    return True


def _api() -> str:
    return public(get_current_settings().api.url or "")
