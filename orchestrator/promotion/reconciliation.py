"""Making the registry say what the history says, and telling whom nobody told.

Only what still holds is told late: of an alias that has moved on since, nobody is told where it was. The history knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError, Problem, PublishError
from orchestrator.promotion.history import LADDER, Placement
from orchestrator.promotion.notify import NOBODY, Notice
from orchestrator.promotion.place import STORE_TAG, tagged_root
from orchestrator.registry import DIGEST_TAG, PROMOTION_TAG, KnownModel, RegisteredVersion

if TYPE_CHECKING:
    from orchestrator.promotion.promoter import Promoter

HEAD_TAG = "orchestrator.promotions.head"  # of a model: SEQUENCE:SHA256 of an entry, so that a shortened history shows


@dataclass(frozen=True)
class Reconciliation:
    """What was repaired or told, what cannot be, and what was left alone, such as aliases that no promotion set."""

    repaired: tuple[str, ...]
    problems: tuple[Problem, ...]
    unrecorded: tuple[str, ...]


def reconcile(promoter: Promoter) -> Reconciliation:
    """Repair what can be, after checking the whole history. Raises `PublishError` if that is damaged.

    What the policy wants approved, and nobody has approved, is a problem: it is neither shown nor told.
    """
    known, entries = promoter.read()
    policy = promoter.policy()
    state = entries[-1].entry.state if entries else {}
    repaired: list[str] = []
    problems: list[Problem] = []
    unrecorded: list[str] = []
    for alias, placed in state.items():
        try:
            version = _registered(promoter, alias, placed)
        except OrchestratorError as error:
            problems += [Problem(problem.what, alias, problem.remedy) for problem in error.problems]
            continue
        at, shown = known.aliases.get(alias), version.tags.get(PROMOTION_TAG + alias) == str(placed.since)
        if alias == LADDER[0] and at not in (None, placed.version):
            if not shown:
                unrecorded.append(
                    f"{alias} is at version {at} in the registry, which never showed entry {placed.since}; if that is "
                    f"to count: `orchestrator promote {promoter.model} {placed.version} --to {alias}`"
                )
            continue  # registered since
        try:
            promoter.require_approved(alias, policy)
        except OrchestratorError as error:  # neither shown nor told
            problems += [Problem(problem.what, alias, problem.remedy) for problem in error.problems]
            continue
        repair = _repair(alias, placed, known, promoter.history.store.uri, shown=shown)
        if repair:
            promoter.show(alias)
            repaired.append(repair)
        for notice in _tell(promoter, alias, placed):
            if notice.told:
                repaired.append(f"{alias}: {notice.target} was told of entry {placed.since}")
            if notice.problem == NOBODY:
                unrecorded.append(f"{alias}: {notice.warning}; entry {placed.since} wanted it")
            elif notice.warning:
                again = f"the promotion stands; `orchestrator reconcile {promoter.model}` tries again"
                problems.append(Problem(notice.warning, alias, again))
    unrecorded += [
        f"{alias} is at version {known.aliases[alias]} in the registry, and no promotion put it there"
        for alias in LADDER[1:]
        if alias in known.aliases and alias not in state
    ]
    return Reconciliation(tuple(repaired), tuple(problems), tuple(unrecorded))


def _registered(promoter: Promoter, alias: str, placed: Placement) -> RegisteredVersion:
    """Return the version that an alias is to be at, if its release is there."""
    version = promoter.registered(placed.version)
    if version.tags[DIGEST_TAG] != placed.release.digest:
        raise PublishError(
            f"version {placed.version} is registered for another release than was put into {alias}",
            remedy="see who changed it in the registry",
        )
    promoter.releases.look_at(placed.release)
    return version


def _repair(alias: str, placed: Placement, known: KnownModel, place: str, *, shown: bool) -> str | None:
    """Say what has to be repaired; None: nothing."""
    at = known.aliases.get(alias)
    if at != placed.version:
        before = f"version {at}" if at else "nothing"
        return f"{alias} was at {before} in the registry, is at version {placed.version} again"
    if not shown or not {STORE_TAG, HEAD_TAG} <= set(known.tags):
        return f"{alias}: the tags about entry {placed.since} were missing in the registry"
    if tagged_root(known) != place:
        return f"{alias}: the registry named another place of the history, {known.tags[STORE_TAG]}"
    return None


def _tell(promoter: Promoter, alias: str, placed: Placement) -> tuple[Notice, ...]:
    """Tell who was not told where an alias is, unless it has moved meanwhile."""
    head = promoter.history.head()
    if head is None or head.entry.state[alias].since != placed.since:
        return ()
    return promoter.deliveries.tell(promoter.policy(), promoter.history.entry(placed.since))
