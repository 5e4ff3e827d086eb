"""The rules of promotion: from one rung to the next, from what was expected, and only what was registered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from orchestrator.errors import ConflictError, PublishError, SpecError
from orchestrator.promotion.history import LADDER, History, Placement, ReleaseRef, Stored, one_line
from orchestrator.registry import DIGEST_TAG, KnownModel, RegisteredVersion
from orchestrator.release import Release


def position(alias: str, head: Stored | None, known: KnownModel) -> str | None:
    """Return the version that an alias is at. Registering moves `candidate` too, and the registry alone knows of it."""
    if alias == LADDER[0] and alias in known.aliases:
        return known.aliases[alias]
    placed = head.entry.state.get(alias) if head else None
    return placed.version if placed else None


def broken_rules(version: str, alias: str, head: Stored | None, known: KnownModel) -> list[str]:
    """Say which rules of the ladder a promotion would break."""
    at = {rung: position(rung, head, known) for rung in LADDER}
    rung = LADDER.index(alias)
    broken = []
    if rung and at.get(LADDER[rung - 1]) != version:
        broken.append(f"is not in {LADDER[rung - 1]}")
    broken += [f"is in {above} already" for above in LADDER[rung + 1 :] if at.get(above) == version]
    return broken


def differences(state: Mapping[str, Placement], known: KnownModel) -> list[str]:
    """Say where the registry does not show what the history says."""
    return [
        f"{alias} is at version {known.aliases.get(alias, 'none')} in the registry, not at {placed.version}: "
        f"`orchestrator reconcile {known.name}` mends that"
        for alias, placed in state.items()
        if alias != LADDER[0] and known.aliases.get(alias) != placed.version
    ]


def check_alias(alias: str) -> None:
    """Raise `SpecError` for anything but the three aliases."""
    if alias not in LADDER:
        raise SpecError(f"{alias!r} is none of the aliases of promotion", remedy=f"one of {', '.join(LADDER)}")


def check_number(version: str) -> None:
    """Raise `SpecError` unless a version is given by its number."""
    if not re.fullmatch(r"[0-9]{1,18}", version):
        raise SpecError(f"{version[:40]!r} is no version", remedy="give its number, of at most 18 digits")


def check_expected(model: str, alias: str, at: str | None, placed: Placement | None, expect: str | None) -> None:
    """Raise `ConflictError` if the alias is not where the user saw it. placed: what the history says of it."""
    now = at or "none"
    if expect is not None and expect != now:
        since = f" since entry {placed.since}" if placed and placed.version == at else ""
        raise ConflictError(
            f"{alias} of {model!r} is at version {now}{since}, not at {expect}",
            remedy=f"look at `orchestrator history {model}` and decide again",
        )


def earlier(history: History, alias: str, now: Placement, to: str | None) -> Placement:
    """Return what `alias` stood at before `now`, or last at version `to`. Raises `SpecError` if there is no such.

    What it is taken from is proven by the newest entry: `PublishError` if anything in between was changed.
    """
    if to is None:
        before = history.since(now.promoted)[0].entry.previous
        if before is None:
            raise SpecError(
                f"version {now.version} is the first of {history.model!r} in {alias}", remedy="nothing to roll back to"
            )
        return before
    check_number(to)
    held = [
        stored.entry.state[alias]
        for stored in history.entries()
        if (stored.entry.alias, stored.entry.version) == (alias, to)
    ]
    if not held:
        raise SpecError(
            f"version {to} of {history.model!r} never was in {alias}",
            remedy=f"`orchestrator history {history.model}` lists those that were; to put it there, promote it",
        )
    return held[-1]


def check_same(release: ReleaseRef, found: Release, model: str) -> None:
    """Raise `PublishError` if what lies there is another release, or one of another model."""
    if found.digest != release.digest:
        raise PublishError(
            f"{one_line(release.uri)} is not the release that was registered: its digest is {found.digest[:12]}, not "
            f"{release.digest[:12]}",
            remedy="do not use it; see who wrote there, and publish again under another name",
        )
    of = found.manifest.get("pipeline", model)
    if of != model:
        raise PublishError(
            f"{one_line(release.uri)} is a release of {of!r}, not of {model!r}",
            remedy="see who registered it here, and promote it under its own name",
        )


def reference(version: RegisteredVersion) -> ReleaseRef:
    """Return the release of a version. Raises `PublishError` if its tag is no digest."""
    digest = version.tags[DIGEST_TAG]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise PublishError(
            f"version {version.version} of {version.name!r} has a tag {DIGEST_TAG} that is no digest: {digest[:80]!r}",
            remedy="see who changed it in the registry; run its specification again to register the release anew",
        )
    return ReleaseRef(name=split(version.source)[1], uri=version.source, digest=digest)


def split(uri: str) -> tuple[str, str]:
    """Split the address of a release into the root of its store and its name."""
    words: Sequence[str] = uri.rstrip("/").rsplit("/", 2)
    if len(words) != 3 or not all(words):
        raise SpecError(f"{uri!r} is no release address", remedy="it looks like s3://BUCKET/PREFIX/NAME/DIGEST")
    return words[0], f"{words[1]}/{words[2]}"
