"""The append-only history of a model's aliases, in the store of its releases.

Each entry holds the sha256 of the entry before, so that changing or removing one shows; and what every alias stands
at after it, so that the newest entry is all that has to be read. Entries are ordered by their sequence number and by
nothing else: `time` is the writer's clock.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.canonical import canonical_json
from orchestrator.errors import ConflictError, GateError, PublishError, SpecError
from orchestrator.foreign import shown
from orchestrator.publishing import Store
from orchestrator.release import check_name

LADDER = ("candidate", "staging", "production")
FOLDER = ".promotion"  # no release has a name that begins with a dot
ACTOR_VARIABLE = "ORCHESTRATOR_ACTOR"
READS_AT_ONCE = 8
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
TEXT_CHARACTERS = 1000  # of a name or a reason
_KEY = re.compile(r"[0-9]{8}\.json|[1-9][0-9]{8,}\.json")

Kind = Literal["promote", "rollback"]
Receiver = Literal["webhook", "command"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sequence = Annotated[int, Field(ge=1)]
Version = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]


class Record(BaseModel):
    """What is kept as canonical JSON in the store: nothing in it is converted, and nothing unknown accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_bytes(self) -> bytes:
        """The record as it is stored."""
        return canonical_json(self.model_dump(mode="json"))


class ReleaseRef(Record):
    """A release. digest: sha256 of its release.json, which lists every file."""

    name: str
    uri: str
    digest: Digest


class Placement(Record):
    """What an alias stands at. since: the entry that put it there; promoted: the entry that did so first, which a
    rollback repeats."""

    version: Version
    release: ReleaseRef
    since: Sequence
    promoted: Sequence


class ApprovalRef(Record):
    """The approval that a promotion relied on: its key, the sha256 of it, and until when it holds."""

    key: str
    sha256: Digest
    by: str
    expires: str | None = None


class SignatureRef(Record):
    """The signature of a release. signed_by: the key's fingerprint. verified: with that key; else model.sig says so."""

    signed_by: Digest
    verified: bool


class Entry(Record):
    """One step of one alias. registered: where registering a release had moved the alias meanwhile, which only the
    registry says. forced: the rules that did not hold. signature: None of an unsigned release. tells: whom the policy
    wanted told. state: of all aliases, after this entry."""

    layout: Literal[1] = 1
    sequence: Sequence
    time: str
    kind: Kind
    model: str
    alias: str
    version: Version
    release: ReleaseRef
    previous: Placement | None
    registered: Version | None = None
    actor: str
    reason: str | None
    forced: tuple[str, ...] = Field((), strict=False)
    approval: ApprovalRef | None
    signature: SignatureRef | None = None
    tells: tuple[Receiver, ...] = Field((), strict=False)
    previous_sha256: Digest | None
    state: dict[str, Placement]
    nonce: str  # two entries are never the same bytes, so that whoever wrote one knows it

    @property
    def at(self) -> datetime:
        """The writer's clock."""
        return parse_time(self.time)

    @property
    def before(self) -> str | None:
        """The version that the alias was at."""
        return self.registered or (self.previous.version if self.previous else None)

    def document(self) -> dict[str, Any]:
        """What people and other programs get to see: all of it but what keeps the history together."""
        return self.model_dump(mode="json", exclude={"layout", "nonce", "state"})


T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Stored:
    """An entry, and the sha256 of its bytes."""

    entry: Entry
    sha256: str


@dataclass(frozen=True)
class Change:
    """What an entry is to say. promoted: for a rollback, the entry that is repeated. relies_on: an alias that must
    stand still as well."""

    kind: Kind
    alias: str
    version: str
    release: ReleaseRef
    reason: str | None = None
    forced: tuple[str, ...] = ()
    approval: ApprovalRef | None = None
    signature: SignatureRef | None = None
    promoted: int | None = None
    relies_on: str | None = None
    registered: str | None = None
    tells: tuple[Receiver, ...] = ()


class History:
    """The history of one model in one store. Raises `PublishError` where the store fails or an entry is not one."""

    def __init__(self, store: Store, model: str) -> None:
        check_name(model)
        self.store, self.model = store, model
        self._folder = f"{model}/{FOLDER}/history"
        self._seen: dict[int, Stored] = {}  # an entry never changes
        self._newest: Stored | None = None

    @property
    def uri(self) -> str:
        """Where the entries are."""
        return f"{self.store.uri}/{self._folder}"

    @property
    def newest_seen(self) -> Stored | None:
        """The newest entry that was read or written here; there may be newer ones."""
        return self._newest

    def head(self) -> Stored | None:
        """Return the newest entry, checked against the one before it; None if nothing was ever promoted."""
        newest = self._newest
        if newest is None and (numbers := self._numbers()):
            newest = self.entry(numbers[-1])
        # A list may be older than the objects: what was created since is found by looking.
        while (after := self._read(newest.entry.sequence + 1 if newest else 1)) is not None:
            newest = after
        if newest is not None and newest != self._newest and newest.entry.sequence > 1:
            before = self.entry(newest.entry.sequence - 1)
            if before.sha256 != newest.entry.previous_sha256:
                raise self._broken(newest.entry.sequence, "does not follow the entry before it")
        self._newest = newest
        return newest

    def entries(self) -> list[Stored]:
        """Return every entry, oldest first; `PublishError` if one is missing, foreign, or was changed afterwards."""
        head = self.head()  # a list may be older
        numbers = sorted({*self._numbers(), *({head.entry.sequence} if head else ())})
        if numbers != list(range(1, len(numbers) + 1)):
            missing = min(set(range(1, numbers[-1])) - set(numbers))
            raise self._broken(missing, "is missing")
        return self._linked(numbers)

    def since(self, sequence: int) -> list[Stored]:
        """Return the entries from one to the newest, each checked against the one before it; `PublishError`."""
        head = self.head()
        return self._linked(range(sequence, head.entry.sequence + 1 if head else sequence))

    def _linked(self, numbers: Iterable[int]) -> list[Stored]:
        """Return entries that follow each other. The last is what proves the first."""
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            entries = list(pool.map(self.entry, numbers))
        for one, after in pairwise(entries):
            if after.entry.previous_sha256 != one.sha256:
                raise self._broken(after.entry.sequence, "does not follow the entry before it")
        return entries

    def entry(self, sequence: int) -> Stored:
        """Return one entry; `PublishError` if it is not there."""
        stored = self._seen.get(sequence) or self._read(sequence)
        if stored is None:
            raise self._broken(sequence, "is missing")
        return stored

    def append(self, head: Stored | None, change: Change) -> Stored:
        """Append an entry to a history whose newest entry is `head`; this is when a promotion happens.

        Where somebody else was faster with an alias that does not matter here, the entry follows theirs.
        `ConflictError` if they moved this alias, or the one it relies on, `GateError` if the approval it relies on
        has just expired: then nothing has been done.
        """
        watched = [change.alias, *filter(None, [change.relies_on])]
        expected = [_placement(head, alias) for alias in watched]
        check_text(change.reason or "", "the reason")
        while True:
            data = self._next(head, change)
            stored = self._parse(data, head.entry.sequence + 1 if head else 1)
            if change.approval and change.approval.expires and stored.entry.time >= change.approval.expires:
                raise GateError(
                    f"the approval by {one_line(change.approval.by)} expired at {change.approval.expires}, "
                    "a moment ago",
                    remedy="ask for another",
                )
            if self.store.create_record(self._key(stored.entry.sequence), data):
                self._newest = stored
                return stored
            head = self.entry(stored.entry.sequence)
            if [_placement(head, alias) for alias in watched] != expected:
                raise self._conflict(change, head.entry)

    def _conflict(self, change: Change, winner: Entry) -> ConflictError:
        return ConflictError(
            f"{one_line(winner.actor)} put version {winner.version} of {self.model!r} into {one_line(winner.alias)} "
            f"meanwhile (entry {winner.sequence}, {winner.time}); version {change.version} was not put there",
            remedy=f"look at `orchestrator history {self.model}` and decide again",
        )

    def _next(self, head: Stored | None, change: Change) -> bytes:
        sequence = head.entry.sequence + 1 if head else 1
        placement = Placement(
            version=change.version,
            release=change.release,
            since=sequence,
            promoted=change.promoted or sequence,
        )
        return Entry(
            sequence=sequence,
            time=written(datetime.now(UTC)),
            kind=change.kind,
            model=self.model,
            alias=change.alias,
            version=change.version,
            release=change.release,
            previous=_placement(head, change.alias),
            registered=change.registered,
            actor=actor(),
            reason=change.reason,
            forced=change.forced,
            approval=change.approval,
            signature=change.signature,
            tells=change.tells,
            previous_sha256=head.sha256 if head else None,
            state={**(head.entry.state if head else {}), change.alias: placement},
            nonce=secrets.token_hex(16),
        ).to_bytes()

    def _numbers(self) -> list[int]:
        names = self.store.list_records(self._folder)
        found = (int(name.removesuffix(".json")) for name in names if _KEY.fullmatch(name))
        return sorted(number for number in found if number)

    def _key(self, sequence: int) -> str:
        return f"{self._folder}/{sequence:08}.json"

    def _read(self, sequence: int) -> Stored | None:
        data = self.store.read_record(self._key(sequence))
        if data is None:
            return None
        self._seen[sequence] = self._parse(data, sequence)
        return self._seen[sequence]

    def _parse(self, data: bytes, sequence: int) -> Stored:
        entry = parse_record(Entry, data)
        if entry is None or entry.sequence != sequence or entry.model != self.model or not _is_sound(entry):
            raise self._broken(sequence, "is not an entry of this history")
        return Stored(entry, hashlib.sha256(data).hexdigest())

    def _broken(self, sequence: int, how: str) -> PublishError:
        return PublishError(
            f"the history {self.uri} is damaged: entry {sequence} {how}",
            remedy="nothing is promoted on it; bring the entries back from a backup or the bucket's older versions",
        )


def parse_record(cls: type[T], data: bytes) -> T | None:
    """Read a record; None if it is none."""
    try:
        return cls.model_validate_json(data)
    except ValidationError:
        return None


def actor(environment: Mapping[str, str] = os.environ) -> str:
    """Who does it: ``ORCHESTRATOR_ACTOR``, or user@host. What the machine says, not what anybody has proven."""
    given = environment.get(ACTOR_VARIABLE, "").strip()
    if given:
        return check_text(given, ACTOR_VARIABLE)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = str(os.getuid())
    return check_text(f"{user}@{socket.gethostname()}", "the user's name", f"say who you are in {ACTOR_VARIABLE}")


def check_text(text: str, what: str, remedy: str = f"write one line of at most {TEXT_CHARACTERS} characters") -> str:
    """Return a text that people gave, if a record can hold it and a terminal show it; `SpecError` if not."""
    if len(text) > TEXT_CHARACTERS or not text.isprintable():
        raise SpecError(f"{what} is too long, or holds line breaks or characters that cannot be shown", remedy=remedy)
    return text


def one_line(text: str) -> str:
    """A text of a record that somebody else may have written, as a part of one line that a terminal can show."""
    return shown(text).replace("\n", "\\n")


def written(time: datetime) -> str:
    """A time as records have it: UTC, microseconds."""
    return time.astimezone(UTC).strftime(TIME_FORMAT)


def parse_time(text: str) -> datetime:
    """Undo `written`. Raises `ValueError`."""
    return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)


def _placement(head: Stored | None, alias: str) -> Placement | None:
    return head.entry.state.get(alias) if head else None


def _is_sound(entry: Entry) -> bool:
    """Whether an entry agrees with itself."""
    try:
        parse_time(entry.time)
    except ValueError:
        return False
    now = entry.state.get(entry.alias)
    return (
        now is not None
        and (now.version, now.release, now.since) == (entry.version, entry.release, entry.sequence)
        and (entry.sequence == 1) == (entry.previous_sha256 is None)
        and all(placed.promoted <= placed.since <= entry.sequence for placed in entry.state.values())
    )
