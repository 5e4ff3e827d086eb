"""What a release is: its files, its listing, and which names are allowed.

A release called NAME is, below the root of a store:

    NAME/<files>        the published folder, byte for byte (empty folders are not kept)
    NAME/release.json   canonical JSON: the manifest plus ``"files": [{"key", "sha256", "bytes"}]``
    NAME/model.sig      if it is signed: a signature over all of these (signing.py)
    NAME/COMPLETE       the sha256 of release.json; written last: without it there is no release
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.canonical import file_sha256
from orchestrator.errors import PublishError, SpecError

RELEASE = "release.json"
COMPLETE = "COMPLETE"
SIGNATURE = "model.sig"
BLOCK_BYTES = 256 << 10  # read at a time; stays in the processor's cache
HASHED_AT_ONCE = 2
PARTS_AT_ONCE = 12  # in which files are cut, of one file
LONGEST_KEY = 1024  # bytes; that of S3
RESERVED = (RELEASE, COMPLETE, SIGNATURE)


@dataclass(frozen=True)
class StoredFile:
    """One file of a release. key: POSIX path relative to the release; sha256: hex."""

    key: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Release:
    """A complete release. digest: sha256 of its release.json; manifest: as given to `publish`, without the files."""

    uri: str
    digest: str
    files: tuple[StoredFile, ...]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Item:
    """What shall be stored under a key: bytes, or a file on this machine.

    parts: the sha256 of each of its parts, where the store asked for them. state: another once the file is written to.
    ahead: what a store keeps about parts that it has sent already.
    """

    file: StoredFile
    data: Path | bytes
    parts: tuple[bytes, ...] = ()
    state: tuple[int, ...] = ()
    ahead: list[Any] = field(default_factory=list)

    @classmethod
    def of_bytes(cls, key: str, data: bytes) -> Item:
        return cls(StoredFile(key, hashlib.sha256(data).hexdigest(), len(data)), data)

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield the content in pieces of `size` bytes; the last one may be shorter."""
        if isinstance(self.data, bytes):
            yield self.data
            return
        with self.data.open("rb") as file:
            while chunk := file.read(size):
                yield chunk

    def piece(self, offset: int, size: int) -> bytes:
        """Return `size` bytes of the content from `offset` on, fewer at its end."""
        if isinstance(self.data, bytes):
            return self.data[offset : offset + size]
        return read_piece(self.data, offset, size)

    @property
    def path(self) -> Path:
        """The file. TypeError if it is none."""
        if isinstance(self.data, bytes):
            raise TypeError(f"{self.file.key} is no file")
        return self.data

    def check_untouched(self) -> None:
        """Raise PublishError if the file was written to since it was hashed."""
        if isinstance(self.data, Path) and state_of(self.data) != self.state:
            raise self.changed()

    def check_unchanged(self, sha256: str) -> None:
        """Raise PublishError if what was read just now is not what was promised."""
        if sha256 != self.file.sha256:
            raise self.changed()

    def changed(self) -> PublishError:
        """Return the error of a file that is not what it was."""
        return PublishError(f"{self.file.key!r} changed while it was being published", remedy="publish again")


def read_piece(path: Path, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on, fewer at its end."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def state_of(path: Path) -> tuple[int, ...]:
    """Return what differs once a file was written to or replaced."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def check_name(name: str) -> None:
    """Raise SpecError unless `name` can name a release."""
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", word) for word in name.split("/")):
        raise SpecError(
            f"{name!r} cannot name a release",
            remedy="use words of letters, digits, '.', '_' and '-', joined by '/', none of which begins with a dot",
        )


def is_plain(key: str) -> bool:
    """Say whether `key` is a relative POSIX path that stays in its folder and reads the same everywhere."""
    plain = key.isprintable() and "\\" not in key and len(key.encode()) <= LONGEST_KEY
    return plain and not {"", ".", ".."} & set(key.split("/"))


def check_key(key: str) -> str:
    """Return `key` if it is plain; PublishError if it is not."""
    if not is_plain(key):
        raise PublishError(f"{key!r} is not a key for a file of a release", remedy="rename the file")
    return key


def walk(folder: Path) -> list[tuple[str, Path]]:
    """Return key and path of every file below `folder`, sorted by key. Links to files count as files."""

    def unreadable(error: OSError) -> None:
        raise error

    paths = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        paths += [Path(place, name) for name in names]
        paths += [path for name in folders if (path := Path(place, name)).is_symlink()]
    found = []
    for path in paths:
        if not path.is_file():
            raise PublishError(f"{path} is not a regular file", remedy="publish a folder of plain files")
        key = check_key(path.relative_to(folder).as_posix())
        if key in RESERVED:
            raise PublishError(f"{path} has a name that a release keeps for itself", remedy="rename the file")
        found.append((key, path))
    if not found:
        raise PublishError(f"{folder} holds no files", remedy="check the path of the folder to publish")
    return sorted(found)


def hash_file(key: str, path: Path, part_bytes: int, see: Callable[[int, bytes], None] | None = None) -> Item:
    """Return a file as an item of a release.

    part_bytes: into parts of what size it will be cut; each is hashed, too, several at once. 0: into none.
    see: called with the number of each part, from 0 on, and its sha256, from the thread that hashed it.
    """
    state = state_of(path)
    if not part_bytes:
        return Item(StoredFile(key, file_sha256(path), state[0]), path, (), state)

    def hash_part(number: int) -> bytes:
        if stop.is_set():
            return b""
        digest = _hash_piece(path, number * part_bytes, part_bytes)
        if see:
            see(number, digest)
        return digest

    stop, count = threading.Event(), -(-state[0] // part_bytes)
    with ThreadPoolExecutor(PARTS_AT_ONCE if see else HASHED_AT_ONCE) as pool:
        try:
            parts = [pool.submit(hash_part, number) for number in range(count)]
            digest = file_sha256(path)
            done = tuple(part.result() for part in parts)
        except BaseException:
            stop.set()
            raise
    return Item(StoredFile(key, digest, state[0]), path, done, state)


def _hash_piece(path: Path, offset: int, size: int) -> bytes:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while size and (count := file.readinto(buffer[: min(size, BLOCK_BYTES)])):
            digest.update(buffer[:count])
            size -= count
    return digest.digest()


def parse(uri: str, body: bytes) -> Release:
    """Read release.json; PublishError if it is not one, or names a key twice or outside the release."""
    try:
        manifest = json.loads(body)
        files = tuple(StoredFile(**entry) for entry in manifest.pop("files"))
        for file in files:
            if not (isinstance(file.key, str) and re.fullmatch("[0-9a-f]{64}", file.sha256)):
                raise ValueError
            if type(file.bytes) is not int or file.bytes < 0:
                raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise PublishError(
            f"the {RELEASE} of {uri} is not one", remedy="delete this release and publish it again"
        ) from None
    keys = [check_key(file.key) for file in files]
    if len({*keys, *RESERVED}) != len(keys) + len(RESERVED):
        raise PublishError(f"the {RELEASE} of {uri} names a key twice", remedy="do not use this release")
    folders = {key[:at] for key in keys for at, letter in enumerate(key) if letter == "/"}
    if folders & set(keys):
        raise PublishError(f"the {RELEASE} of {uri} has a file for a folder", remedy="do not use this release")
    return Release(uri, hashlib.sha256(body).hexdigest(), files, manifest)
