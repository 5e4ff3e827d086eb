"""Where releases live: ``file://`` folders and ``s3://`` buckets, create-only.

`open_store` is the way in. What a release is, is in release.py; how it gets here and back, in publishing.py; what is
special about buckets, in store_s3.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from orchestrator.canonical import sync_folder
from orchestrator.errors import PreflightError, SpecError
from orchestrator.publishing import Store
from orchestrator.release import Item, Release, StoredFile, is_plain
from orchestrator.store_s3 import S3Store
from orchestrator.transfer import CHUNK_BYTES, Meter, MissingError, Progress, TakenError

__all__ = ["Progress", "Release", "Store", "StoredFile", "open_store"]


def open_store(uri: str, *, create_bucket: bool = False) -> Store:
    """Return the store whose root is `uri`, without touching disk or network.

    uri: ``file:///abs/path``, a path, or ``s3://bucket/prefix``; SpecError for anything else.
    create_bucket: make the S3 bucket if there is none, on `check` or `publish`.
    """
    scheme, separator, rest = uri.partition("://")
    place = rest.partition("/")[0]
    if separator and "@" in place:  # the address is not repeated: it holds a secret
        raise SpecError(
            f"the {scheme}:// address holds credentials",
            remedy="take them out; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    if not separator and uri:
        try:
            return FileStore(Path(uri).expanduser())
        except RuntimeError:
            raise SpecError(f"there is no home folder {Path(uri).parts[0]}", remedy="write the path in full") from None
    if scheme == "file" and place in ("", "localhost") and rest.removeprefix(place).startswith("/"):
        return FileStore(Path(unquote(rest.removeprefix(place))))
    prefix = rest[len(place) :].strip("/")
    plain = is_plain(prefix or "-") and not set("?#") & set(prefix)
    if scheme == "s3" and re.fullmatch(r"[A-Za-z0-9._-]{3,255}", place) and plain:
        return S3Store(place, prefix, create_bucket=create_bucket)
    shown = uri.partition("?")[0]  # what follows may be a signature
    raise SpecError(f"{shown!r} is no address for releases", remedy="use s3://bucket/prefix, file:///folder or a path")


class FileStore(Store):
    """A folder. Files are written aside, flushed, and appear under their name by a hard link, which never replaces."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self.uri = self._root.as_uri()
        self._staging = self._root / ".incoming"

    def check(self) -> None:
        with self._errors(PreflightError, f"cannot use {self.uri}"):
            folder = self._root
            while not folder.exists():
                folder = folder.parent
            probe = folder / f".orchestrator-check-{uuid.uuid4().hex}"
            twin = probe.with_name(f"{probe.name}-link")
            try:
                probe.write_bytes(bytes(4096))  # a full disk still takes empty files
                os.link(probe, twin)
            finally:
                probe.unlink(missing_ok=True)
                twin.unlink(missing_ok=True)

    def _prepare(self) -> None:
        """Make the staging folder, and remove what killed publishers left there: nobody holds its lock any more."""
        self._check_inside(self._staging)  # what is in it is going to be removed
        _make_folder(self._staging)
        for path in self._staging.iterdir():
            with suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _check_inside(self, folder: Path) -> None:
        """Raise OSError if a link that somebody put into the store leads out of it."""
        if not folder.resolve().is_relative_to(self._root.resolve()):
            raise OSError(errno.ELOOP, "a link leads out of the store", str(folder))

    def _read(self, key: str, offset: int = 0) -> Iterator[bytes]:
        try:
            # Where a pipe stands in a file's place, this does not wait for somebody to write to it.
            file = os.fdopen(os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError from None
        with file:
            file.seek(offset)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _size(self, key: str) -> int | None:
        try:
            return (self._root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _list(self, folder: str) -> Iterator[str]:
        try:
            paths = list((self._root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from (path.name for path in paths if path.is_file())

    def _list_tree(self, name: str) -> Iterator[str]:
        root = self._root / name
        yield from (path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())

    def _create(self, key: str, item: Item, meter: Meter) -> None:
        path, part = self._root / key, self._staging / uuid.uuid4().hex
        self._check_inside(path.parent)
        _make_folder(path.parent)
        digest = hashlib.sha256()
        with part.open("xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                for chunk in item.chunks(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                    meter.advance(item.file, len(chunk))
                item.check_unchanged(digest.hexdigest())
                file.flush()
                os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o222)  # it never changes
                os.fsync(file.fileno())
                with suppress(FileNotFoundError):  # swept away before it was locked: the caller looks and tries again
                    os.link(part, path)
                    sync_folder(path.parent)
                    return
            except FileExistsError:
                pass
            finally:
                part.unlink(missing_ok=True)
        raise TakenError


def _make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, durably."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
