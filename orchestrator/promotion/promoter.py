"""Moving a model's aliases: promote, roll back, reconcile.

In this order: the bytes of the release are verified; an entry is appended to the history in the store, which is when
it happens; then MLflow's alias and tags are written and read back, and whoever wants to know is told. A release whose
run failed its gates has no version, so that nothing here can promote it.

Registering a release may move `candidate` too, in the registry alone. So the registry is believed about that alias,
and the history about the other two.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.errors import GateError, OrchestratorError, Problem, PublishError, SpecError
from orchestrator.home import Settings
from orchestrator.promotion.approval import Approvals
from orchestrator.promotion.deliveries import Deliveries
from orchestrator.promotion.history import (
    LADDER,
    ApprovalRef,
    Change,
    History,
    Placement,
    ReleaseRef,
    Stored,
    actor,
    check_text,
    one_line,
)
from orchestrator.promotion.notify import Notice, check_policy, receivers
from orchestrator.promotion.place import STORE_TAG as STORE_TAG
from orchestrator.promotion.place import find_store
from orchestrator.promotion.policy import Policy, policy_for
from orchestrator.promotion.reconciliation import HEAD_TAG as HEAD_TAG
from orchestrator.promotion.reconciliation import Reconciliation, reconcile
from orchestrator.promotion.releases import Releases
from orchestrator.promotion.rules import (
    broken_rules,
    check_alias,
    check_expected,
    check_number,
    earlier,
    position,
    reference,
)
from orchestrator.promotion.signature import demanded_keys
from orchestrator.registry import (
    DIGEST_TAG,
    PROMOTION_TAG,
    KnownModel,
    ModelRegistry,
    OverwrittenError,
    RegisteredVersion,
)
from orchestrator.signing import VerifyKey
from orchestrator.store import Progress

SHOWINGS, PAUSE_SECONDS = 8, 0.1  # how often what the history says is shown while others write to the registry too
VERSION_TAG = PROMOTION_TAG  # of a version, and the alias: the entry that put it there


@dataclass(frozen=True)
class Promotion:
    """What came of it. done: the entry; None: the alias had been there already."""

    alias: str
    version: str
    done: Stored | None
    notices: tuple[Notice, ...] = ()

    def document(self, model: str) -> dict[str, Any]:
        """What `promote --json` prints."""
        return {
            "model": model,
            "alias": self.alias,
            "version": self.version,
            "changed": self.done is not None,
            "entry": {**self.done.entry.document(), "sha256": self.done.sha256} if self.done else None,
            "notices": [
                {"target": notice.target, "problem": notice.problem, "told": notice.told} for notice in self.notices
            ],
        }


class Promoter:
    """The aliases of one model. Raises `SpecError`, `PreflightError`, `GateError` or `PublishError`.

    model: its name, or ``models:/NAME``.
    store: the root of the store with the history; None: where the policy says, the registry, or the model's releases.
    """

    def __init__(self, model: str, settings: Settings, store: str | None = None) -> None:
        self.model, self._settings, self._given = model.removeprefix("models:/"), settings, store
        self.registry = ModelRegistry(settings.tracking_uri)
        self._history: History | None = None

    @property
    def history(self) -> History:
        """The history, found on first use."""
        if self._history is None:
            self._history = History(
                find_store(
                    self.registry, self.registry.need_model(self.model), self._given, pinned=self.policy().store
                ),
                self.model,
            )
        return self._history

    @cached_property
    def releases(self) -> Releases:
        """The bytes."""
        return Releases(self.history.store, self.model)

    @property
    def deliveries(self) -> Deliveries:
        """Who was told."""
        return Deliveries(self.history.store, self.model)

    def policy(self) -> Policy:
        """What promotion.yaml says of the model. Raises as `policy_for` does."""
        return policy_for(self.model, self._settings.home)

    def promote(
        self,
        version: str,
        alias: str,
        *,
        reason: str | None = None,
        force: bool = False,
        expect: str | None = None,
        require_approval: bool = False,
        verify_key: Path | None = None,
        progress: Progress | None = None,
    ) -> Promotion:
        """Let `alias` name the release of `version`, a number or another alias.

        force: also where the version does not come from the rung below, which the entry then says.
        expect: the version that the alias has to be at before, or ``none``; else `ConflictError`.
        require_approval: whatever the policy says.
        verify_key: a public key (PEM) that must have signed the release; None: what the environment and the policy say.
        """
        policy, keys = self._begin(alias, reason, verify_key)
        known, head = self._look()
        candidate = self.registered(version)
        release = reference(candidate)
        placed = head.entry.state.get(alias) if head else None
        at = position(alias, head, known)
        check_expected(self.model, alias, at, placed, expect)
        if placed is not None and (placed.version, placed.release, at) == (candidate.version, release, placed.version):
            self.require_approved(alias, policy)
            self.releases.signature(candidate, release, keys)
            self.show(alias)
            return Promotion(alias, candidate.version, None)
        broken = broken_rules(candidate.version, alias, head, known)
        if broken and not force:
            raise SpecError(
                f"version {candidate.version} of {self.model!r} {' and '.join(broken)}",
                remedy=f"go step by step from {' to '.join(LADDER)}, or use --force, which the history will say",
            )
        needs_approval = require_approval or alias in policy.require_approval
        self._approval(policy, release, alias, needed=needs_approval)
        rejected = () if needs_approval else self._rejected(policy, candidate.version, release, alias, force=force)
        self.history.entries()  # all of it is sound
        signature = self.releases.signature(candidate, release, keys)
        self.releases.verify(release, progress)
        change = Change(
            kind="promote",
            alias=alias,
            version=candidate.version,
            release=release,
            reason=reason,
            forced=(*broken, *rejected),
            approval=self._approval(policy, release, alias, needed=needs_approval),  # verifying may have taken hours
            signature=signature,
            relies_on=None if broken or alias == LADDER[0] else LADDER[LADDER.index(alias) - 1],
            registered=_unrecorded(placed, at, candidate.version),
            tells=receivers(policy),
        )
        return self._commit(head, change, policy)

    def rollback(
        self,
        alias: str = LADDER[-1],
        *,
        to: str | None = None,
        reason: str | None = None,
        force: bool = False,
        expect: str | None = None,
        verify_key: Path | None = None,
    ) -> Promotion:
        """Let `alias` name the release that it named before, or that of version `to`, which it must have named once.

        The bytes stay where they are; that the files are all there is looked at, but they are not read. The signature
        is verified as it is by `promote`: it covers the listing, which is small. No approval is asked for.

        force: also where the newest decision about the release is a rejection, which the entry then says.
        """
        policy, keys = self._begin(alias, reason, verify_key)
        known, head = self._look()
        placed = head.entry.state.get(alias) if head else None
        if head is None or placed is None:
            raise SpecError(f"{self.model!r} never had a version in {alias}", remedy="nothing to roll back")
        at = position(alias, head, known)
        check_expected(self.model, alias, at, placed, expect)
        if to == placed.version == at:
            self.show(alias)
            return Promotion(alias, placed.version, None)
        target = placed if at != placed.version and to is None else earlier(self.history, alias, placed, to)
        registered = self.registered(target.version)
        if registered.tags[DIGEST_TAG] != target.release.digest:
            raise PublishError(
                f"version {target.version} of {self.model!r} is registered for another release than was in {alias}",
                remedy="see who changed it in the registry, or name another version with --to",
            )
        rejected = self._rejected(policy, target.version, target.release, alias, force=force)
        self.releases.look_at(target.release)
        change = Change(
            kind="rollback",
            alias=alias,
            version=target.version,
            release=target.release,
            reason=reason,
            forced=rejected,
            signature=self.releases.signature(registered, target.release, keys),
            promoted=target.promoted,
            registered=_unrecorded(placed, at, target.version),
            tells=receivers(policy),
        )
        return self._commit(head, change, policy)

    def reconcile(self) -> Reconciliation:
        """Make the registry say what the history says, after checking the whole of it, and tell whom nobody told."""
        return reconcile(self)

    def read(self) -> tuple[KnownModel, list[Stored]]:
        """Return what the registry says, and every entry of the history, which holds all that the registry knows of."""
        known = self.registry.need_model(self.model)
        entries = self.history.entries()
        self._check_anchor(known, entries[-1] if entries else None)
        return known, entries

    def require_approved(self, alias: str, policy: Policy) -> None:
        """Raise `GateError` if the history has put into `alias` what the policy wants approved, and nobody approved."""
        if alias in policy.require_approval:
            entries = [stored.entry for stored in self.history.entries()]
            Approvals(self.history.store, self.model).require_of(entries, alias, policy.approvers)

    def resolve(self, version: str) -> tuple[str, ReleaseRef]:
        """Return the number of a version, given as a number or an alias, and its release."""
        found = self.registered(version)
        return found.version, reference(found)

    def _begin(self, alias: str, reason: str | None, verify_key: Path | None) -> tuple[Policy, tuple[VerifyKey, ...]]:
        """Find all that is wrong before anything is looked at."""
        check_alias(alias)
        check_text(reason or "", "the reason")
        actor()
        policy = self.policy()
        check_policy(policy)
        return policy, demanded_keys(policy, verify_key)

    def _commit(self, head: Stored | None, change: Change, policy: Policy) -> Promotion:
        done = self.history.append(head, change)
        try:
            self.show(change.alias)
        except OrchestratorError as error:
            raise PublishError(
                [
                    Problem(
                        f"version {change.version} of {self.model!r} is in {change.alias} (entry "
                        f"{done.entry.sequence} of the history), but the registry does not show it: {problem.what}",
                        problem.where,
                        f"run `orchestrator reconcile {self.model}` once the registry works",
                    )
                    for problem in error.problems
                ]
            ) from error
        return Promotion(change.alias, change.version, done, self.deliveries.tell(policy, done))

    def show(self, alias: str) -> None:
        """Write what the history says of `alias` to the registry, until nobody has moved it meanwhile.

        Of two promotions the later may be shown first. Whoever writes looks again afterwards, so that the last write
        is always followed by somebody who sees the newest entry.
        """
        head = self.history.newest_seen or self.history.head()
        again = SHOWINGS
        while head is not None:
            placed = head.entry.state[alias]
            try:
                self.registry.show_promotion(
                    self.model,
                    alias,
                    placed.version,
                    version_tags={VERSION_TAG + alias: str(placed.since)},
                    model_tags={STORE_TAG: self.history.store.uri, HEAD_TAG: f"{head.entry.sequence}:{head.sha256}"},
                )
                written = True
            except PublishError as error:
                again -= 1
                if self.history.head() == head:
                    if not again or not isinstance(error, OverwrittenError):
                        raise
                    time.sleep(PAUSE_SECONDS)  # an earlier promotion is being shown late: what counts is shown again
                written = False
            newest = self.history.head()
            if written and newest == head:
                return
            head = newest

    def _look(self) -> tuple[KnownModel, Stored | None]:
        """What the registry and the history say now. The registry first: it can only be behind."""
        known = self.registry.need_model(self.model)
        head = self.history.head()
        self._check_anchor(known, head)
        return known, head

    def _check_anchor(self, known: KnownModel, head: Stored | None) -> None:
        """Raise `PublishError` if the history no longer holds an entry that the registry remembers."""
        number, _, sha256 = known.tags.get(HEAD_TAG, "").partition(":")
        if not (number.isascii() and number.isdigit() and len(number) < 13 and int(number)):
            return
        if head is not None and head.entry.sequence >= int(number):
            if self.history.entry(int(number)).sha256 == sha256:
                return
            what = f"its entry {number} was replaced"
        else:
            what = f"the registry knows of {number} entries, and it has {head.entry.sequence if head else 0}"
        raise PublishError(
            f"the history {self.history.uri} is damaged: {what}",
            remedy=f"bring it back from a backup or the bucket's older versions; if it is to count as it is, delete "
            f"the tag {HEAD_TAG} of the registered model",
        )

    def registered(self, version: str) -> RegisteredVersion:
        """Return a version, given as a number or an alias. Raises `SpecError` if it is none of this program's."""
        version = version.removeprefix("@")
        if version in LADDER[1:] and (head := self.history.head()) and (placed := head.entry.state.get(version)):
            version = placed.version  # decided here, wherever the registry's alias is
        numbered = version.isascii() and version.isdigit()
        if numbered:
            check_number(version)
        found = self.registry.resolve(f"models:/{self.model}{'/' if numbered else '@'}{version}")
        if DIGEST_TAG not in found.tags:
            raise SpecError(
                f"version {found.version} of {self.model!r} was not registered by this program",
                remedy="register it with a specification's register step",
            )
        return found

    def _approval(self, policy: Policy, release: ReleaseRef, alias: str, *, needed: bool) -> ApprovalRef | None:
        if not needed:
            return None
        entries = [stored.entry for stored in self.history.entries()]
        used = {entry.approval.sha256: entry.sequence for entry in entries if entry.approval}
        return Approvals(self.history.store, self.model).require(release.digest, alias, policy.approvers, used)

    def _rejected(
        self, policy: Policy, version: str, release: ReleaseRef, alias: str, *, force: bool
    ) -> tuple[str, ...]:
        """Return what the history is to say of a rejection that is forced; `GateError` if it is not forced."""
        decision = Approvals(self.history.store, self.model).rejection(release.digest, alias, policy.approvers)
        if decision is None:
            return ()
        if not force:
            why = f": {one_line(decision.reason)}" if decision.reason else ""
            raise GateError(
                f"{one_line(decision.by)} rejected version {version} of {self.model!r} for {alias}{why}",
                remedy="ask them, name another version, or use --force, which the history will say",
            )
        return (f"was rejected by {one_line(decision.by)}",)


def _unrecorded(placed: Placement | None, at: str | None, version: str) -> str | None:
    """Return where registering moved an alias that now goes to `version`; None: there is nothing new to say."""
    return None if at in (version, placed.version if placed else None) else at
