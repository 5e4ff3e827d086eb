"""Moving a model's aliases: promote, roll back, reconcile.

In this order: the bytes of the release are verified; an entry is appended to the history in the store, which is when
it happens; then MLflow's alias and tags are written and read back, and whoever wants to know is told. A release whose
run failed its gates has no version, so that nothing here can promote it.

Registering a release may move `candidate` too, in the registry alone. So the registry is believed about that alias,
and the history about the other two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError, Problem, PublishError, SpecError
from orchestrator.home import Settings
from orchestrator.promotion.approval import Approvals
from orchestrator.promotion.history import (
    LADDER,
    ApprovalRef,
    Change,
    History,
    ReleaseRef,
    SignatureRef,
    Stored,
)
from orchestrator.promotion.notify import Notice, check_policy, notify
from orchestrator.promotion.place import STORE_TAG as STORE_TAG
from orchestrator.promotion.place import find_store
from orchestrator.promotion.policy import Policy, policy_for
from orchestrator.promotion.rules import (
    broken_rules,
    check_alias,
    check_expected,
    check_same,
    earlier,
    reference,
    split,
)
from orchestrator.promotion.signature import SIGNED_BY_TAG, check_signed, demanded_keys
from orchestrator.registry import DIGEST_TAG, KnownModel, ModelRegistry, OverwrittenError, RegisteredVersion
from orchestrator.signing import VerifyKey
from orchestrator.store import Progress, Store, open_store

HEAD_TAG = "orchestrator.promotions.head"  # of a model: SEQUENCE:SHA256 of an entry, so that a shortened history shows
SHOWINGS, PAUSE_SECONDS = 8, 0.1  # how often what the history says is shown while others write to the registry too
VERSION_TAG = "orchestrator.promotion."  # of a version, and the alias: the entry that put it there


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
            "notices": [{"target": notice.target, "problem": notice.problem} for notice in self.notices],
        }


@dataclass(frozen=True)
class Reconciliation:
    """What was repaired, what cannot be, and aliases that no promotion set and that were left alone."""

    repaired: tuple[str, ...]
    problems: tuple[Problem, ...]
    unrecorded: tuple[str, ...]


class Promoter:
    """The aliases of one model. Raises `SpecError`, `PreflightError`, `GateError` or `PublishError`.

    store: the root of the store with the history; None: where the registry says, or beside the model's releases.
    """

    def __init__(self, model: str, settings: Settings, store: str | None = None) -> None:
        self.model, self._settings, self._given = model, settings, store
        self.registry = ModelRegistry(settings.tracking_uri)
        self._history: History | None = None

    @property
    def history(self) -> History:
        """The history, found on first use."""
        if self._history is None:
            self._history = History(
                find_store(self.registry, self.registry.need_model(self.model), self._given), self.model
            )
        return self._history

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
        check_alias(alias)
        policy = policy_for(self.model, self._settings.home)
        check_policy(policy)
        keys = demanded_keys(policy, verify_key)
        known, head = self._look()
        candidate = self._resolve(version)
        release = reference(candidate)
        now = head.entry.state.get(alias) if head else None
        check_expected(self.model, alias, now, expect)
        if now is not None and (now.version, now.release) == (candidate.version, release):
            self._signature(candidate, release, keys)
            self._show(alias)
            return Promotion(alias, candidate.version, None)
        broken = broken_rules(candidate.version, alias, head, known)
        if broken and not force:
            raise SpecError(
                f"version {candidate.version} of {self.model!r} {' and '.join(broken)}",
                remedy=f"go step by step from {' to '.join(LADDER)}, or use --force, which the history will say",
            )
        needs_approval = require_approval or alias in policy.require_approval
        self._approval(policy, release, alias, needed=needs_approval)
        self.history.entries()  # all of it is sound
        signature = self._signature(candidate, release, keys)
        self._verify(release, progress)
        change = Change(
            kind="promote",
            alias=alias,
            version=candidate.version,
            release=release,
            reason=reason,
            forced=tuple(broken),
            approval=self._approval(policy, release, alias, needed=needs_approval),  # verifying may have taken hours
            signature=signature,
            relies_on=None if broken or alias == LADDER[0] else LADDER[LADDER.index(alias) - 1],
        )
        return self._commit(head, change, policy)

    def rollback(
        self,
        alias: str = LADDER[-1],
        *,
        to: str | None = None,
        reason: str | None = None,
        expect: str | None = None,
        verify_key: Path | None = None,
    ) -> Promotion:
        """Let `alias` name the release that it named before, or that of version `to`, which it must have named once.

        The bytes stay where they are; that the files are all there is looked at, but they are not read. The signature
        is verified as it is by `promote`: it covers the listing, which is small.
        """
        check_alias(alias)
        policy = policy_for(self.model, self._settings.home)
        check_policy(policy)
        keys = demanded_keys(policy, verify_key)
        _, head = self._look()
        now = head.entry.state.get(alias) if head else None
        if head is None or now is None:
            raise SpecError(f"{self.model!r} never had a version in {alias}", remedy="nothing to roll back")
        check_expected(self.model, alias, now, expect)
        if to == now.version:
            self._show(alias)
            return Promotion(alias, now.version, None)
        target = earlier(self.history, alias, now, to)
        registered = self._resolve(target.version)
        if registered.tags[DIGEST_TAG] != target.release.digest:
            raise PublishError(
                f"version {target.version} of {self.model!r} is registered for another release than was in {alias}",
                remedy="see who changed it in the registry, or name another version with --to",
            )
        self._look_at(target.release)
        signature = self._signature(registered, target.release, keys)
        change = Change(
            kind="rollback",
            alias=alias,
            version=target.version,
            release=target.release,
            reason=reason,
            signature=signature,
            promoted=target.promoted,
        )
        return self._commit(head, change, policy)

    def reconcile(self) -> Reconciliation:
        """Make the registry say what the history says, after checking the whole of it."""
        known, entries = self.read()
        state = entries[-1].entry.state if entries else {}
        repaired: list[str] = []
        problems: list[Problem] = []
        for alias, placed in state.items():
            try:
                if (version := self._resolve(placed.version)).tags[DIGEST_TAG] != placed.release.digest:
                    raise PublishError(
                        f"version {placed.version} is registered for another release than was put into {alias}",
                        remedy="see who changed it in the registry",
                    )
                self._look_at(placed.release)
            except OrchestratorError as error:
                problems += [Problem(problem.what, alias, problem.remedy) for problem in error.problems]
                continue
            at, tag = known.aliases.get(alias), version.tags.get(VERSION_TAG + alias)
            if alias == LADDER[0] and at is not None and at != placed.version:
                continue  # registered since
            if at != placed.version:
                before = f"version {at}" if at else "nothing"
                repaired.append(f"{alias} was at {before} in the registry, is at version {placed.version} again")
            elif tag != str(placed.since) or not {STORE_TAG, HEAD_TAG} <= set(known.tags):
                repaired.append(f"{alias}: the tags about entry {placed.since} were missing in the registry")
            else:
                continue
            self._show(alias)
        unrecorded = [
            f"{alias} is at version {known.aliases[alias]} in the registry, and no promotion put it there"
            for alias in LADDER[1:]
            if alias in known.aliases and alias not in state
        ]
        return Reconciliation(tuple(repaired), tuple(problems), tuple(unrecorded))

    def read(self) -> tuple[KnownModel, list[Stored]]:
        """Return what the registry says, and every entry of the history, which holds all that the registry knows of."""
        known = self.registry.need_model(self.model)
        entries = self.history.entries()
        self._check_anchor(known, entries[-1] if entries else None)
        return known, entries

    def resolve(self, version: str) -> tuple[str, ReleaseRef]:
        """Return the number of a version, given as a number or an alias, and its release."""
        found = self._resolve(version)
        return found.version, reference(found)

    def _commit(self, head: Stored | None, change: Change, policy: Policy) -> Promotion:
        done = self.history.append(head, change)
        try:
            self._show(change.alias)
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
        return Promotion(change.alias, change.version, done, notify(policy, done))

    def _show(self, alias: str) -> None:
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
                shown = True
            except PublishError as error:
                again -= 1
                if self.history.head() == head:
                    if not again or not isinstance(error, OverwrittenError):
                        raise
                    time.sleep(PAUSE_SECONDS)  # an earlier promotion is being shown late: what counts is shown again
                shown = False
            newest = self.history.head()
            if shown and newest == head:
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

    def _resolve(self, version: str) -> RegisteredVersion:
        version = version.removeprefix("@")
        if version in LADDER[1:] and (head := self.history.head()) and (placed := head.entry.state.get(version)):
            version = placed.version  # decided here, wherever the registry's alias is
        mark = "/" if version.isascii() and version.isdigit() else "@"
        found = self.registry.resolve(f"models:/{self.model}{mark}{version}")
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

    def _verify(self, release: ReleaseRef, progress: Progress | None) -> None:
        """Read every byte. Raises `PublishError` if one is not what was registered."""
        store, name = self._locate(release)
        check_same(release, store.verify(name, progress), self.model)

    def _signature(
        self, version: RegisteredVersion, release: ReleaseRef, keys: Sequence[VerifyKey]
    ) -> SignatureRef | None:
        """Check the signature of a release, of which no file is read. Raises `PublishError`."""
        store, name = self._locate(release)
        found, signature = store.read_signed(name)
        check_same(release, found, self.model)
        return check_signed(found, signature, keys, version.tags.get(SIGNED_BY_TAG))

    def _look_at(self, release: ReleaseRef) -> None:
        store, name = self._locate(release)
        found = store.read_release(name)
        if found is None:
            raise PublishError(
                f"{release.uri} is not complete", remedy="run again what published it, or name another version"
            )
        check_same(release, found, self.model)

    def _locate(self, release: ReleaseRef) -> tuple[Store, str]:
        """Return the store of a release, which is seldom another than the history's, and its name there."""
        root, name = split(release.uri)
        return (self.history.store if root == self.history.store.uri else open_store(root)), name
