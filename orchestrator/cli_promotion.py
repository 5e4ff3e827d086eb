"""The commands that say which release is in production: promote, rollback, approve, history, reconcile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli_output import print_json, print_text, results_only, say
from orchestrator.errors import PublishError, SpecError

if TYPE_CHECKING:
    from orchestrator.promotion.history import Entry, SignatureRef
    from orchestrator.promotion.promoter import Promoter, Promotion

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A registered model, by its name.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="Its version: a number, or an alias.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why; the history keeps it.")]
ExpectOption = Annotated[
    str | None,
    typer.Option("--expect", metavar="VERSION", help="Only if the alias is at this version now, or 'none'."),
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="URI", help="Root of the store with the history; else the registry knows it."),
]
VerifyKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--verify-key",
        metavar="KEY",
        envvar="ORCHESTRATOR_VERIFY_KEY",
        help="Refuse what this public key (PEM) has not signed.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (promote, rollback, approve, history, reconcile):
        app.command(command.__name__)(command)


@results_only
def promote(
    model: ModelArgument,
    version: VersionArgument,
    to: Annotated[str, typer.Option("--to", metavar="ALIAS", help="candidate, staging or production.")],
    reason: ReasonOption = None,
    force: Annotated[bool, typer.Option("--force", help="Skip a step or go back, on the record.")] = False,
    require_approval: Annotated[
        bool, typer.Option("--require-approval", help="Only with an approval that holds, whatever the policy says.")
    ] = False,
    expect: ExpectOption = None,
    verify_key: VerifyKeyOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a version into staging or production: bytes verified, recorded in the store, shown by the registry."""
    promoter = _promoter(model, store)
    promotion = promoter.promote(
        version,
        to,
        reason=reason,
        force=force,
        expect=expect,
        require_approval=require_approval,
        verify_key=verify_key,
    )
    _print(promoter.model, promotion, as_json)


@results_only
def rollback(
    model: ModelArgument,
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS", help="Which alias goes back.")] = "production",
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="A version that it was at; else the one before.")
    ] = None,
    reason: ReasonOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also to what was rejected, on the record.")] = False,
    expect: ExpectOption = None,
    verify_key: VerifyKeyOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put back what was in production before. No byte of a model is moved or read."""
    promoter = _promoter(model, store)
    promotion = promoter.rollback(alias, to=to, reason=reason, force=force, expect=expect, verify_key=verify_key)
    _print(promoter.model, promotion, as_json)


@results_only
def approve(
    model: ModelArgument,
    version: VersionArgument,
    alias: Annotated[str, typer.Option("--for", metavar="ALIAS", help="staging or production.")],
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="Who decides.")],
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="For how long: 30m, 24h, 7d.")] = "24h",
    reject: Annotated[bool, typer.Option("--reject", help="Decide against it; takes back an approval.")] = False,
    reason: ReasonOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record a person's decision about a release, with an expiry; promotions that need one look for it."""
    from orchestrator.promotion.approval import Approvals, parse_duration
    from orchestrator.promotion.rules import check_alias

    check_alias(alias)
    lasts = parse_duration(expires)
    promoter = _promoter(model, store)
    number, release = promoter.resolve(version)
    filed = Approvals(promoter.history.store, promoter.model).decide(
        number, release.digest, alias, by=by, lasts=lasts, approve=not reject, reason=reason
    )
    if as_json:
        print_json({**filed.approval.model_dump(mode="json"), "key": filed.key, "sha256": filed.sha256})
        return
    done = "rejected" if reject else "approved"
    until = "" if reject else f" until {filed.approval.expires}"
    _text(f"{promoter.model} version {number} ({release.digest[:12]}) {done} for {alias} by {filed.approval.by}{until}")


@results_only
def history(
    model: ModelArgument,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="What was there then: 2026-11-29T18:30, UTC.")
    ] = None,
    alias: Annotated[
        str | None, typer.Option("--alias", metavar="ALIAS", help="Of this alias only; with --at: production.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what was promoted when, by whom and why; with --at, what was in production at a time."""
    from orchestrator.promotion import timeline
    from orchestrator.promotion.history import History
    from orchestrator.promotion.rules import check_alias, differences
    from orchestrator.store import open_store

    if alias is not None:
        check_alias(alias)
    when = timeline.parse_moment(at) if at is not None else None
    if store is not None:
        model = model.removeprefix("models:/")
        log, known = History(open_store(store), model), None
        stored = log.entries()
        if not stored and not log.store.holds(model):
            raise SpecError(
                f"{log.store.uri} holds neither a history nor a release of {model!r}",
                remedy="correct --store or the name; without --store the registry knows the place",
            )
    else:
        promoter = _promoter(model, None)
        model = promoter.model
        known, stored = promoter.read()
        log = promoter.history
    entries = [one.entry for one in stored]
    for line in differences(entries[-1].state, known) if entries and known else ():
        _note(line)
    for entry in timeline.from_the_future(entries):
        _note(
            f"clocks disagree: entry {entry.sequence} ({entry.actor}) is of {entry.time}, which has not come "
            "on this machine"
        )
    for one, after in timeline.disagreements(entries):
        _note(
            f"clocks disagreed: entry {after.sequence} ({after.actor}) is of {after.time}, before entry "
            f"{one.sequence} ({one.actor}) of {one.time}"
        )
    if when is None:
        chosen = [one for one in stored if alias in (None, one.entry.alias)]
        if as_json:
            state = entries[-1].state if entries else {}
            print_json(
                {
                    "model": model,
                    "store": log.uri,
                    "now": {name: placed.model_dump(mode="json") for name, placed in state.items()},
                    "entries": [{**one.entry.document(), "sha256": one.sha256} for one in chosen],
                }
            )
        else:
            _text(*[_line(one.entry) for one in chosen] or [f"{model}: nothing was promoted yet"])
        return
    alias = alias or "production"
    answer = timeline.at(entries, alias, when)
    if as_json:
        print_json(
            {
                "model": model,
                "alias": alias,
                "at": when.isoformat(),
                "version": answer.entry.version if answer.entry else None,
                "entry": answer.entry.document() if answer.entry else None,
                "certain": not answer.others,
                "perhaps": [other.document() for other in answer.others],
            }
        )
        return
    _text(_line(answer.entry) if answer.entry else f"{model}: nothing was in {alias} at {when.isoformat()}")
    for other in answer.others:
        _text("or, as clocks disagreed by then:", _line(other))


@results_only
def reconcile(model: ModelArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Make the registry say what the history says, and tell whom nobody told: after a crash, or a lost alias."""
    from dataclasses import asdict

    promoter = _promoter(model, store)
    found = promoter.reconcile()
    if as_json:
        print_json({"model": promoter.model, **asdict(found)})
    else:
        _text(*found.repaired or [f"{promoter.model}: nothing to repair"])
    for line in found.unrecorded:
        _note(line)
    if found.problems:
        raise PublishError(found.problems)


def _promoter(model: str, store: str | None) -> Promoter:
    from orchestrator.home import Settings
    from orchestrator.promotion.promoter import Promoter

    return Promoter(model, Settings.from_environment(), store)


def _print(model: str, promotion: Promotion, as_json: bool) -> None:
    done = promotion.done
    if as_json:
        print_json(promotion.document(model))
    elif done is None:
        _text(f"{model} version {promotion.version} is in {promotion.alias} already")
    else:
        before = f"version {done.entry.before} before" if done.entry.before else "the first there"
        _text(f"{model} version {promotion.version} is in {promotion.alias}; {before}; entry {done.entry.sequence}")
    for notice in promotion.notices:
        if notice.warning:
            remedy = f"`orchestrator reconcile {model}` tries again"
            say(f"warning: {_shown(notice.warning)}; the promotion stands; {remedy}")


def _text(*lines: str) -> None:
    print_text("\n".join(_shown(line) for line in lines))


def _note(line: str) -> None:
    say(f"note: {_shown(line)}")


def _shown(line: str) -> str:
    """One line, whatever somebody wrote into a store that others read."""
    from orchestrator.promotion.history import one_line

    return one_line(line)


def _line(entry: Entry) -> str:
    previous = f" (was {entry.before})" if entry.before else ""
    notes = [f"approved by {entry.approval.by}"] if entry.approval else []
    notes += [_signed(entry.signature)] if entry.signature else []
    notes += [f"forced: {', '.join(entry.forced)}"] if entry.forced else []
    notes += [entry.reason] if entry.reason else []
    return (
        f"{entry.sequence:>4}  {entry.time}  {entry.kind:<8}  {entry.alias:<10}  version {entry.version}{previous}  "
        f"{entry.release.digest[:12]}  {entry.actor}" + (f"  {'; '.join(notes)}" if notes else "")
    )


def _signed(signature: SignatureRef) -> str:
    return f"signed by {signature.signed_by[:16]}{'' if signature.verified else ', not verified'}"
