"""What an alias stood at at a given time, said by clocks that may disagree.

The order of entries is their sequence, which no clock can change. A clock only bounds when an entry was made: not
before any entry before it, and not after any entry after it. Where the two bounds of an entry differ, a clock was
wrong, and for a time between them there is more than one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate, pairwise

from orchestrator.errors import SpecError
from orchestrator.promotion.history import Entry

CLOCK_TOLERANCE = timedelta(minutes=5)  # clocks of two machines that are kept right


@dataclass(frozen=True)
class Answer:
    """entry: what had put the alias where it was; None: nothing yet. others: entries that had perhaps been made by
    then as well, if clocks disagree about that time."""

    entry: Entry | None
    others: tuple[Entry, ...] = ()


def at(entries: Sequence[Entry], alias: str, when: datetime, now: datetime | None = None) -> Answer:
    """Say which of `entries` (all of a history, in order) decided where `alias` stood at `when`.

    Among several possible answers the first is that of the latest bounds: an entry counts from when no clock denies it.
    now: by this machine's clock, when they were read: none of them was made later, whatever its writer's clock said.
    """
    now = datetime.now(UTC) if now is None else now
    latest = list(accumulate((entry.at for entry in entries), max))
    earliest = list(accumulate((entry.at for entry in reversed(entries)), min, initial=now))[:0:-1]
    certain = sum(time <= when or now <= when for time in latest)  # both rise with the sequence
    possible = sum(time <= when for time in earliest)
    before = [entry for entry in entries[:certain] if entry.alias == alias]
    entry = before[-1] if before else None
    return Answer(entry, tuple(other for other in entries[certain:possible] if other.alias == alias))


def disagreements(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Return the pairs of neighbours of which the later one has the earlier time."""
    return [(one, after) for one, after in pairwise(entries) if after.at < one.at]


def from_the_future(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that were made later than now, if their writers' clocks and this machine's are right."""
    now = datetime.now(UTC) + CLOCK_TOLERANCE
    return [entry for entry in entries if entry.at > now]


def parse_moment(text: str) -> datetime:
    """Read a time of the command line: ISO 8601; without an offset it is UTC. Raises `SpecError`."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(
            f"{text!r} is no time", remedy="write it as 2026-11-29T18:30, or with an offset, 2026-11-29T18:30+01:00"
        ) from None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise SpecError(f"{text!r} lies outside of the calendar", remedy="write another time") from None
