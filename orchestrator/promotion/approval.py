"""Decisions of people about a release: recorded once, in the store, with who decided and until when it counts.

An approval holds for one release (its digest, not its version number), one alias and one promotion. The newest decision
counts, so that a rejection takes an approval back. Nothing here proves who somebody is: whoever may write to the store
may approve, which is a matter of the store's permissions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from orchestrator.errors import GateError, PublishError, SpecError
from orchestrator.promotion.history import (
    FOLDER,
    ApprovalRef,
    Digest,
    Entry,
    Record,
    Version,
    actor,
    check_text,
    one_line,
    parse_record,
    parse_time,
    written,
)
from orchestrator.promotion.timeline import CLOCK_TOLERANCE
from orchestrator.publishing import Store
from orchestrator.release import check_name

_NAME = re.compile(r"\d{6}\.json")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LONGEST = timedelta(weeks=520)


class Approval(Record):
    """One decision. by: who decided; actor: who recorded it. time, expires: clock of the machine that recorded it."""

    layout: Literal[1] = 1
    model: str
    version: Version
    digest: Digest
    alias: str
    decision: Literal["approve", "reject"]
    by: str
    actor: str
    time: str
    expires: str
    reason: str | None


@dataclass(frozen=True)
class Filed:
    """A decision, and where it is."""

    approval: Approval
    key: str
    sha256: str


class Approvals:
    """The decisions about one model. Raises `PublishError` where the store fails or holds something else."""

    def __init__(self, store: Store, model: str) -> None:
        check_name(model)
        self.store, self.model = store, model

    def decide(
        self,
        version: str,
        digest: str,
        alias: str,
        *,
        by: str,
        lasts: timedelta,
        approve: bool = True,
        reason: str | None = None,
    ) -> Filed:
        """Record a decision about a release. Raises `SpecError` for a name or a time that will not do."""
        if not by.strip():
            raise SpecError("--by names nobody", remedy="say who decides: --by NAME")
        check_text(by, "the name of who decides")
        check_text(reason or "", "the reason")
        now = datetime.now(UTC)
        approval = Approval(
            model=self.model,
            version=version,
            digest=digest,
            alias=alias,
            decision="approve" if approve else "reject",
            by=by.strip(),
            actor=actor(),
            time=written(now),
            expires=written(now + lasts),
            reason=reason,
        )
        data = approval.to_bytes()
        number = int(([f"{0:06}.json", *self._names(digest, alias)][-1]).removesuffix(".json")) + 1
        while not self.store.create_record(key := self._key(digest, alias, number), data):
            number += 1  # somebody else decided in the meantime: this decision comes after theirs
        return Filed(approval, key, hashlib.sha256(data).hexdigest())

    def decisions(self, digest: str, alias: str) -> list[Filed]:
        """Return all decisions about a release and an alias, the newest last."""
        filed = []
        for name in self._names(digest, alias):
            key = f"{self._folder(digest, alias)}/{name}"
            data = self.store.read_record(key)
            approval = parse_record(Approval, data) if data is not None else None
            if data is None or approval is None or not _is_about(approval, self.model, digest, alias):
                raise PublishError(
                    f"{self.store.uri}/{key} is no decision about this release", remedy="see who wrote it, and why"
                )
            filed.append(Filed(approval, key, hashlib.sha256(data).hexdigest()))
        return filed

    def rejection(self, digest: str, alias: str, approvers: Sequence[str] | None = None) -> Approval | None:
        """Return the newest decision of those who may decide, if it is a rejection."""
        may = [
            one.approval for one in self.decisions(digest, alias) if approvers is None or one.approval.by in approvers
        ]
        return may[-1] if may and may[-1].decision == "reject" else None

    def require(
        self, digest: str, alias: str, approvers: Sequence[str] | None = None, used: Mapping[str, int] | None = None
    ) -> ApprovalRef:
        """Return the approval that stands now. Raises `GateError` if there is none, or it does not hold.

        approvers: who may approve; None: anybody. What others decided is not looked at.
        used: by the sha256 of an approval, the entry of the history that relied on it. Whoever let a release pass has
            not said that it may return after it was rolled back.
        """
        remedy = f"`orchestrator approve {self.model} VERSION --for {alias} --by NAME`"
        everybody = self.decisions(digest, alias)
        filed = [one for one in everybody if approvers is None or one.approval.by in approvers]
        if not filed:
            others = sorted({one.approval.by for one in everybody})
            who = f" by {' or '.join(approvers)}" if approvers else ""
            heard = f"; {one_line(', '.join(others))} may not decide" if others else ""
            raise GateError(f"release {digest[:12]} is not approved for {alias}{who}{heard}", remedy=remedy)
        newest = filed[-1].approval
        by = one_line(newest.by)
        now = datetime.now(UTC)
        if newest.decision == "reject":
            why = f": {one_line(newest.reason)}" if newest.reason else ""
            raise GateError(f"{by} rejected release {digest[:12]} for {alias}{why}", remedy="ask them")
        if parse_time(newest.time) > now + CLOCK_TOLERANCE:
            raise GateError(
                f"the approval by {by} is of {newest.time}, and here it is {written(now)}: one of two clocks is "
                "wrong, so that nobody can say whether it has expired",
                remedy="set the clocks",
            )
        if parse_time(newest.expires) <= now:
            raise GateError(f"the approval by {by} expired at {newest.expires}", remedy=remedy)
        if used and (entry := used.get(filed[-1].sha256)):
            raise GateError(
                f"the approval by {by} of {newest.time} was for one promotion: entry {entry} of the history",
                remedy=remedy,
            )
        return ApprovalRef(key=filed[-1].key, sha256=filed[-1].sha256, by=newest.by, expires=newest.expires)

    def require_of(self, entries: Sequence[Entry], alias: str, approvers: Sequence[str] | None = None) -> None:
        """Raise `GateError` unless what `alias` stands at was approved. entries: the whole history, oldest first.

        Its promotion is to name a decision that is there, whose newest will do as well where it names none: one that
        had not expired by then, or was made since, and that no other entry used. So a release that was promoted
        before the policy demanded an approval is approved afterwards. A rollback counts as what it repeats.
        """
        placed = entries[-1].state[alias]
        entry = entries[placed.promoted - 1]
        if (entry.alias, entry.release) != (alias, placed.release):
            entry = entries[placed.since - 1]  # it repeats nothing, whatever it says
        digest = placed.release.digest
        filed = [one for one in self.decisions(digest, alias) if approvers is None or one.approval.by in approvers]
        used = {one.approval.sha256 for one in entries if one.approval and one.sequence != entry.sequence}
        named = entry.approval.sha256 if entry.approval else None
        holding = [one for one in filed if one.sha256 == named] or filed[-1:]
        if not any(
            one.approval.decision == "approve" and one.approval.expires > entry.time and one.sha256 not in used
            for one in holding
        ):
            who = f" by {' or '.join(approvers)}" if approvers else ""
            raise GateError(
                f"version {placed.version} came into {alias} (entry {placed.since} of the history) without the approval"
                f"{who} that the policy demands",
                remedy=f"see who promoted it; if it is to stay: `orchestrator approve {self.model} {placed.version} "
                f"--for {alias} --by NAME`, and reconcile again; else roll back",
            )

    def _names(self, digest: str, alias: str) -> list[str]:
        return [name for name in self.store.list_records(self._folder(digest, alias)) if _NAME.fullmatch(name)]

    def _folder(self, digest: str, alias: str) -> str:
        return f"{self.model}/{FOLDER}/approvals/{digest}/{alias}"

    def _key(self, digest: str, alias: str, number: int) -> str:
        return f"{self._folder(digest, alias)}/{number:06}.json"


def parse_duration(text: str) -> timedelta:
    """Read ``30m``, ``24h``, ``7d`` or ``2w``. Raises `SpecError`."""
    match = re.fullmatch(r"([1-9]\d{0,5})([mhdw])", text.strip())
    lasts = timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else None
    if lasts is None or lasts > _LONGEST:
        raise SpecError(f"{text!r} is no duration", remedy="write 30m, 24h, 7d or 2w; ten years at most")
    return lasts


def _is_about(approval: Approval, model: str, digest: str, alias: str) -> bool:
    try:
        parse_time(approval.time), parse_time(approval.expires)
    except ValueError:
        return False
    return (approval.model, approval.digest, approval.alias) == (model, digest, alias)
