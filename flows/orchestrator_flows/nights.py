"""What becomes of runs of one deployment that come too late or too early: a missed night, an overlap, a killed run.

Prefect's concurrency limit lets one run of a deployment work at a time and cancels those that come meanwhile, without
saying more than that the limit is reached. The run at work says the rest: which run holds the place and since when,
or that it catches up for the nights that were missed. All times are those of the Prefect server's clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException

CATCH_UP = "catch-up"  # a tag: this run was started for one that was killed, and is not started again
SUPERSEDED = "Superseded"
REFUSED = "Refused"
_LIMIT_REACHED = "Deployment concurrency limit reached."  # Prefect's message, of a run that its limit cancelled
_WATCH_SECONDS = 10.0
_AT_ONCE = 200  # what Prefect returns
_AT_WORK = {StateType.PENDING, StateType.RUNNING, StateType.CANCELLING}


async def give_way(client: PrefectClient, run: FlowRun) -> State[Any] | None:
    """Let one scheduled run catch up for all that are due: this one, unless a later night has been worked already.

    Returns the state in which this run is to end at once, or None if it is to work; then the other nights of the same
    schedule that are due have ended.
    """
    if not run.deployment_id or not run.auto_scheduled:
        return None
    nights = [
        other for other in await _runs(client, run.deployment_id, before=told_at(run)) if _same_schedule(run, other)
    ]
    for other in nights:
        later = _due(other) > _due(run)
        if later and other.run_count and other.state_type in (StateType.COMPLETED, StateType.FAILED):
            return _ended(SUPERSEDED, f"superseded by the night of {_night(other)}, which ran as {other.name}")
    for other in nights:
        if other.state_type == StateType.SCHEDULED:
            await client.set_flow_run_state(other.id, _ended(SUPERSEDED, _caught_up(run)))
    return None


@asynccontextmanager
async def watched(run: FlowRun, who: str, logger: logging.Logger | logging.LoggerAdapter[Any]) -> AsyncIterator[None]:
    """Tell the runs that Prefect's limit refuses during this block why. who: the process at work, as people read it."""
    if not run.deployment_id:
        yield
        return

    async def watch() -> None:
        while True:
            await _explain(run, who, logger)
            await asyncio.sleep(_WATCH_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await _explain(run, who, logger)


async def _explain(run: FlowRun, who: str, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
    try:
        async with get_client() as client:
            run = await client.read_flow_run(run.id)  # it has been named meanwhile
            states = await client.read_flow_run_states(run.id)
            since = min(state.timestamp for state in states if state.type in _AT_WORK)
            started = run.start_time or since
            for other in await refused(client, run, since):
                if run.auto_scheduled and _same_schedule(run, other) and _due(other) < started:
                    state = _ended(SUPERSEDED, _caught_up(run))
                else:
                    state = _ended(
                        REFUSED,
                        f"refused: {run.name} ({run.id}) is still at work, since {_moment(started)}, {who}; what it "
                        "finishes is found in the store. Give it more time between two nights, or end it: prefect "
                        f"flow-run cancel {run.id}",
                    )
                await client.set_flow_run_state(other.id, state, force=True)
    except (httpx.HTTPError, PrefectException, ValueError) as error:  # it only tells
        logger.debug("runs that were refused were not told why: %s", error)


async def refused(client: PrefectClient, run: FlowRun, since: datetime) -> list[FlowRun]:
    """The runs of the same deployment that Prefect's limit refused since then, and that have not been told why."""
    if not run.deployment_id:
        return []
    found = await _runs(client, run.deployment_id, StateType.CANCELLED)
    return [
        other
        for other in found
        if other.state and other.state.message == _LIMIT_REACHED and other.state.timestamp >= since
    ]


async def keep_place(client: PrefectClient, run: FlowRun) -> None:
    """Take the place of a run at work again, if Prefect gave it up.

    Prefect counts places. It frees that of a killed run when its lease expires, and once more when the run is ended;
    the second is the place of whoever works by then.
    """
    if not run.deployment_id:
        return
    limit = (await client.read_deployment(run.deployment_id)).global_concurrency_limit
    if limit and limit.active_slots < 1:
        await client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=1))


async def take_up_again(client: PrefectClient, killed: FlowRun, now: datetime) -> FlowRun | None:
    """Start a killed run of a deployment once more, with its parameters; None if there is no need, or no point.

    There is no need if another run of the deployment with these parameters is due, at work, or has finished since; no
    point in doing so for a run that was itself such a second try.
    """
    if not killed.deployment_id or CATCH_UP in killed.tags:
        return None
    begun = killed.start_time or now
    for other in await _runs(client, killed.deployment_id, before=now):
        if other.id == killed.id or other.parameters != killed.parameters:
            continue
        done = other.state_type == StateType.COMPLETED and other.start_time and other.start_time >= begun
        if done or other.state_type in _AT_WORK or other.state_type == StateType.SCHEDULED:
            return None
    again = await client.create_flow_run_from_deployment(
        killed.deployment_id,
        parameters=killed.parameters,
        tags=[CATCH_UP],
        idempotency_key=f"{CATCH_UP}-{killed.id}",  # at most once, whoever heals
    )
    for other in await refused(client, killed, begun):
        message = f"refused by the place of {killed.name} ({killed.id}), which had been killed; {again.name} catches up"
        await client.set_flow_run_state(other.id, _ended(SUPERSEDED, message), force=True)
    return again


def told_at(run: FlowRun) -> datetime:
    """When the server gave the run the state that it has, by the server's clock."""
    return run.state.timestamp if run.state else datetime.now(UTC)


async def _runs(
    client: PrefectClient, deployment_id: UUID, *types: StateType, before: datetime | None = None
) -> list[FlowRun]:
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))) if types else None,
            expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": before}) if before else None,
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=_AT_ONCE,
    )


def _same_schedule(run: FlowRun, other: FlowRun) -> bool:
    mine, its = run.created_by, other.created_by
    return other.id != run.id and other.auto_scheduled and bool(mine and its and mine.id == its.id)


def _due(run: FlowRun) -> datetime:
    return run.expected_start_time or datetime.min.replace(tzinfo=UTC)


def _night(run: FlowRun) -> str:
    return _moment(_due(run))


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _caught_up(run: FlowRun) -> str:
    return f"superseded by the night of {_night(run)}: {run.name} ({run.id}) catches up for all that were missed"


def _ended(name: str, message: str) -> State[Any]:
    return State(type=StateType.CANCELLED, name=name, message=message)
