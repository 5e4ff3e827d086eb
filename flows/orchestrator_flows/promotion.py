"""Promotion and rollback as flows, for a schedule, an automation or a button in Prefect's interface.

What decides is the history in the release store, as without Prefect; a flow run only shows it. Approvals are those
of `orchestrator approve`: no flow waits for anybody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_client, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from prefect.runtime import flow_run

from orchestrator.home import Settings
from orchestrator.promotion.promoter import Promoter, Promotion
from orchestrator_flows.output import outlive_reader
from orchestrator_flows.pipeline import artifact_key, in_thread

Alias = Literal["candidate", "staging", "production"]


@flow(name="promote-model", persist_result=True, result_serializer="json", retries=0, validate_parameters=True)
async def promote_model(
    model: str,
    version: str,
    to: Alias,
    reason: str | None = None,
    require_approval: bool = False,
    expect: str | None = None,
    force: bool = False,
    verify_key: str | None = None,
) -> dict[str, Any]:
    """Put a version of a registered model into staging or production, as `orchestrator promote` does.

    version: a number or an alias. verify_key: a file on the worker; else what ORCHESTRATOR_VERIFY_KEY says there.
    Returns the document of `orchestrator promote --json`. Raises `OrchestratorError`.
    """
    outlive_reader()
    promoter = Promoter(model, Settings.from_environment())
    promotion = await in_thread(
        lambda: promoter.promote(
            version,
            to,
            reason=reason,
            require_approval=require_approval,
            expect=expect,
            force=force,
            verify_key=None if verify_key is None else Path(verify_key),
        )
    )
    return await _shown(promoter.model, promotion)


@flow(name="rollback-model", persist_result=True, result_serializer="json", retries=0, validate_parameters=True)
async def rollback_model(
    model: str,
    alias: Alias = "production",
    to: str | None = None,
    reason: str | None = None,
    expect: str | None = None,
    force: bool = False,
    verify_key: str | None = None,
) -> dict[str, Any]:
    """Put back what an alias named before, or version `to`, as `orchestrator rollback` does.

    Returns the document of `orchestrator rollback --json`. Raises `OrchestratorError`.
    """
    outlive_reader()
    promoter = Promoter(model, Settings.from_environment())
    key = None if verify_key is None else Path(verify_key)
    promotion = await in_thread(
        lambda: promoter.rollback(alias, to=to, reason=reason, force=force, expect=expect, verify_key=key)
    )
    return await _shown(promoter.model, promotion)


async def _shown(model: str, promotion: Promotion) -> dict[str, Any]:
    """Name the flow run after what it did, and publish that; a target that could not be told is a warning."""
    logger = get_run_logger()
    document = promotion.document(model)
    async with get_client() as client:
        await client.set_flow_run_name(flow_run.id, f"{model}-{promotion.version}-{promotion.alias}")
    if promotion.done is None:
        logger.info("version %s of %s is in %s already", promotion.version, model, promotion.alias)
    else:
        entry = promotion.done.entry
        await acreate_markdown_artifact(
            key=f"{artifact_key(model)}-{promotion.alias}",
            markdown=f"`{entry.release.uri}`\n\n"
            f"- version {entry.version}, before: {entry.before or 'none'}\n"
            f"- digest `{entry.release.digest}`\n"
            f"- entry {entry.sequence} of the history, by {entry.actor}\n",
            description=f"{model} in {promotion.alias}",
        )
    for notice in promotion.notices:
        if notice.warning:
            logger.warning("%s; the promotion stands; `orchestrator reconcile %s` tries again", notice.warning, model)
    return document
