"""How a folder becomes a release in any store: create-only, COMPLETE last. How it comes back is in pulling.py.

No key is ever overwritten. A publish that was killed leaves keys but no COMPLETE; publishing the same content again
goes on from there. What differs between kinds of storage is in store.py: a handful of primitives.
"""

from __future__ import annotations

import hashlib
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.canonical import canonical_json
from orchestrator.errors import PublishError
from orchestrator.pulling import ReleaseReader, mend
from orchestrator.release import (
    COMPLETE,
    RELEASE,
    SIGNATURE,
    Item,
    Release,
    StoredFile,
    check_key,
    check_name,
    hash_file,
    parse,
    walk,
)
from orchestrator.signing import SigningKey, check_signature
from orchestrator.transfer import (
    ATTEMPTS,
    RECORD_BYTES,
    Meter,
    MissingError,
    Progress,
    TakenError,
    in_parallel,
)


class Store(ReleaseReader):
    """A root under which releases live. Safe to use from several threads; publishers on other machines may race it."""

    @abstractmethod
    def check(self) -> None:
        """Find out in seconds, leaving nothing behind, whether a release could be published; PreflightError if not."""

    def publish(
        self,
        name: str,
        folder: Path,
        manifest: dict[str, Any],
        progress: Progress | None = None,
        *,
        signing_key: Path | None = None,
    ) -> Release:
        """Store every file of `folder` as the release `name`; return it once it is complete.

        name: words joined by ``/``, e.g. ``quickstart/3f2a``.
        progress: called with (key, bytes more), one call at a time, from whichever thread did the work. What it raises
            ends the publish and is passed on.
        signing_key: a private key (PEM) to sign the release with.

        Publishing the same files again returns the release that is there, with the manifest it was first given, and
        puts back files that got lost.
        Raises PublishError if it cannot be done or would overwrite anything; then no new release is visible.
        """
        check_name(name)
        if "files" in manifest:
            raise ValueError("the manifest of a release must not have an entry 'files': publish adds it")
        uri = f"{self.uri}/{name}"
        meter = Meter(progress)
        key = None if signing_key is None else SigningKey.read(signing_key)
        with self._errors(PublishError, f"cannot publish {uri}"):
            paths = walk(folder)
            self._prepare()
            with ThreadPoolExecutor(1) as beside:
                looking = beside.submit(self._take_up, name, paths)
                there = set(self._list_tree(name))
                looking.result()
            existing = self._read_listing(name) if COMPLETE in there else None
            with ExitStack() as sent:
                items = [self._hash(name, *entry, there, meter, sent) for entry in paths]
                files = tuple(item.file for item in items)
                body = canonical_json({**manifest, "files": [asdict(file) for file in files]})
                if existing is not None and parse(uri, existing).files != files:
                    remedy = "publish under another name"
                    raise PublishError(f"{uri} is already published with other files", remedy=remedy)
                self._settle_all(name, items, there, meter)
            with ThreadPoolExecutor(1) as beside:
                clearing = beside.submit(self._clear_up, name, paths)
                absent = RELEASE not in there
                ours, body = body, self._settle_listing(f"{name}/{RELEASE}", body, files, absent=absent)
                release = parse(uri, body)
                if key:
                    self._settle_signature(name, release, key, ours=body == ours)
                clearing.result()
            seal = f"{release.digest}\n".encode()
            self._settle(f"{name}/{COMPLETE}", Item.of_bytes(COMPLETE, seal), Meter(), absent=COMPLETE not in there)
            return release

    def read_release(self, name: str) -> Release | None:
        """Return the release `name`, or None if it is not complete or a file is missing: publishing repairs both.

        Looks at the size of every file, not at its bytes: `fetch` does that. PublishError if the release is damaged.
        """
        check_name(name)
        with self._errors(PublishError, f"cannot read {self.uri}/{name}"):
            body = self._read_listing(name)
            if body is None:
                return None
            release = parse(f"{self.uri}/{name}", body)
            return release if self._is_whole(name, release) else None

    def verify(self, name: str, progress: Progress | None = None) -> Release:
        """Read every byte of the release `name` and compare it with what was published; nothing is kept.

        Raises PublishError if there is no such release, a file is missing, or any byte differs.
        """
        check_name(name)
        meter = Meter(progress)
        with self._errors(PublishError, f"cannot verify {self.uri}/{name}"):
            body = self._read_listing(name)
            if body is None:
                raise PublishError(f"there is no complete release {self.uri}/{name}", remedy="publish it again")
            release = parse(f"{self.uri}/{name}", body)

            def compare(file: StoredFile) -> None:
                digest, size = hashlib.sha256(), 0
                place = f"{release.uri}/{file.key}"
                try:
                    for chunk in self._read(f"{name}/{file.key}"):
                        digest.update(chunk)
                        size += len(chunk)
                        meter.advance(file, len(chunk))
                except MissingError:
                    raise PublishError(f"{place} is missing", remedy="publish the release again") from None
                if (digest.hexdigest(), size) != (file.sha256, file.bytes):
                    raise PublishError(
                        f"{place} is not what was published: its sha256 or size differs from {RELEASE}",
                        remedy=mend(place),
                    )

            in_parallel(compare, release.files, meter.stop)
            return release

    def read_record(self, key: str) -> bytes | None:
        """Return the record at `key`, or None. Records are small objects beside releases, such as who promoted what.

        Raises PublishError if it cannot be read, or is larger than any record of ours.
        """
        check_key(key)
        with self._errors(PublishError, f"cannot read {self.uri}/{key}"):
            data = bytearray()
            try:
                for chunk in self._read(key):
                    data += chunk
                    if len(data) > RECORD_BYTES:
                        raise PublishError(f"{self.uri}/{key} is no record: it is too large", remedy="see who wrote it")
            except MissingError:
                return None
            return bytes(data)

    def create_record(self, key: str, data: bytes) -> bool:
        """Create the record at `key` and read it back; say whether `data` is what is there now.

        False: somebody else's record was there first, and it stays. Of several callers with different data exactly
        one gets True: this is the compare-and-swap that promotion rests on. Raises PublishError.
        """
        check_key(key)
        item = Item.of_bytes(key, data)
        with self._errors(PublishError, f"cannot write {self.uri}/{key}"):
            self._prepare()
            for attempt in range(ATTEMPTS):
                with suppress(TakenError):
                    self._create(key, item, Meter())
                # Also where it was created: an answer that got lost is asked for again, and then the key is taken.
                found = self._get(key)
                if found is not None:
                    return found == data
                time.sleep(0.1 * 2**attempt)
        raise PublishError(f"{self.uri}/{key} is being written by others all the time", remedy="try again later")

    def list_records(self, folder: str) -> list[str]:
        """Return the names of the records right below `folder`, sorted; [] if there is none. Raises PublishError."""
        check_key(folder)
        with self._errors(PublishError, f"cannot list {self.uri}/{folder}"):
            return sorted(self._list(folder))

    def holds(self, folder: str) -> bool:
        """Whether anything lies below `folder`. Raises PublishError."""
        check_key(folder)
        with self._errors(PublishError, f"cannot list {self.uri}/{folder}"):
            return any(True for _ in self._list_tree(folder))

    def _is_whole(self, name: str, release: Release) -> bool:
        """Whether every file is there; PublishError if one has another size than was published."""
        sizes: dict[str, int | None] = {}

        def measure(file: StoredFile) -> None:
            sizes[file.key] = self._size(f"{name}/{file.key}")

        in_parallel(measure, release.files, threading.Event())
        for file in release.files:
            size = sizes[file.key]
            if size not in (None, file.bytes):
                place = f"{release.uri}/{file.key}"
                raise PublishError(f"{place} has {size} bytes, not the {file.bytes} published", remedy=mend(place))
        return None not in sizes.values()

    @abstractmethod
    def _prepare(self) -> None:
        """Get ready to publish."""

    def _hash(self, name: str, key: str, path: Path, there: Set[str], meter: Meter, sent: ExitStack) -> Item:
        """Return a file as an item. A store may begin to send it meanwhile; `sent` takes that back if all fails."""
        return hash_file(key, path, 0)

    def _settle_all(self, name: str, items: Sequence[Item], there: Set[str], meter: Meter) -> None:
        # Also of a complete release: a file that got lost is put back.
        in_parallel(
            lambda item: self._settle(f"{name}/{item.file.key}", item, meter, absent=item.file.key not in there),
            items,
            meter.stop,
        )

    @abstractmethod
    def _create(self, key: str, item: Item, meter: Meter) -> None:
        """Store `item` at `key`, whole or not at all; TakenError if the key exists."""

    @abstractmethod
    def _size(self, key: str) -> int | None:
        """Return the size in bytes of what is at `key`, or None."""

    @abstractmethod
    def _list(self, folder: str) -> Iterator[str]:
        """Yield the names of the files right below `folder`."""

    def _identify(self, key: str) -> tuple[str, int] | None:
        """Return (sha256, size in bytes) of what is at `key`, or None."""
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in self._read(key):
                digest.update(chunk)
                size += len(chunk)
        except MissingError:
            return None
        return digest.hexdigest(), size

    def _holds(self, key: str, item: Item) -> bool | None:
        """Whether `item` is what is at `key`; None if nothing is."""
        found = self._identify(key)
        return found and found == (item.file.sha256, item.file.bytes)

    def _take_up(self, name: str, paths: Sequence[tuple[str, Path]]) -> None:
        """Look for what killed publishers of the release `name` left, to go on from it."""

    def _clear_up(self, name: str, paths: Sequence[tuple[str, Path]]) -> None:
        """Remove what they left and nobody needs any more: every file is there."""

    @abstractmethod
    def _list_tree(self, name: str) -> Iterator[str]:
        """Yield the keys of all objects below the release `name`, relative to it."""

    def _settle(self, key: str, item: Item, meter: Meter, *, absent: bool = False) -> None:
        """See to it that `key` holds `item`, creating it at most; what is there already is accepted if identical.

        absent: nothing was there a moment ago.
        """

        def is_ours() -> bool | None:
            return self._holds(key, item)

        self._create_unless(key, item, meter, is_ours, absent=absent)
        meter.advance(item.file, item.file.bytes)

    def _settle_signature(self, name: str, release: Release, key: SigningKey, *, ours: bool) -> None:
        """See to it that the release is signed by `key`. The first signature stays, so this one may be refused.

        ours: whether its listing is what this publish wrote. What somebody else says of a model is not signed.
        """
        place = f"{name}/{SIGNATURE}"
        for _ in range(ATTEMPTS):
            found = self._get(place)
            if found is not None:
                check_signature(release, found, key.public)
                return
            if not ours:
                raise PublishError(
                    f"{release.uri} was begun, unsigned, with another {RELEASE} than this publish would write",
                    remedy=f"see who published it; delete its {COMPLETE} and {RELEASE}, then publish again",
                )
            with suppress(TakenError):
                self._create(place, Item.of_bytes(SIGNATURE, key.sign(release, name.rpartition("/")[2])), Meter())
        raise PublishError(f"{self.uri}/{place} is being written by others all the time", remedy="try again later")

    def _settle_listing(self, key: str, body: bytes, files: tuple[StoredFile, ...], *, absent: bool) -> bytes:
        """Store release.json and return it; one that is there already is adopted if it lists the same files."""
        kept = body

        def lists_ours() -> bool | None:
            nonlocal kept
            found = self._get(key)
            if found is None:
                return None
            kept = found
            return parse(f"{self.uri}/{key}", found).files == files

        self._create_unless(key, Item.of_bytes(RELEASE, body), Meter(), lists_ours, absent=absent)
        return kept

    def _create_unless(
        self, key: str, item: Item, meter: Meter, is_ours: Callable[[], bool | None], *, absent: bool = False
    ) -> None:
        """Create `key` unless something is there. is_ours: None if nothing is, else whether that will do.

        Losing a race, or an answer that got lost and was asked for again, is settled by looking at what is there.
        """
        for attempt in range(ATTEMPTS):
            verdict = None if absent and attempt == 0 else is_ours()
            if verdict is None:
                try:
                    return self._create(key, item, meter)
                except TakenError:
                    time.sleep(0.1 * 2**attempt)
            elif verdict:
                return None
            else:
                place = f"{self.uri}/{key}"
                raise PublishError(
                    f"{place} exists with other content and is never overwritten",
                    remedy=f"publish under another name; or, if nobody else is writing this release, {mend(place)}",
                )
        raise PublishError(f"{self.uri}/{key} is being written by others all the time", remedy="try again later")
