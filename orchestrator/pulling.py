"""How a release comes back from any store: verified against its listing and its signature, whole or not at all.

A release is downloaded into a hidden folder beside the target, and moved in one rename once every byte is verified. A
pull that was killed, interrupted or left without an answer leaves that folder, and the next one goes on from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from orchestrator.bill import BILL, check_bill
from orchestrator.canonical import sync_folder
from orchestrator.errors import OrchestratorError, PreflightError, PublishError, SpecError
from orchestrator.release import COMPLETE, RELEASE, SIGNATURE, Release, StoredFile, check_name, parse
from orchestrator.signing import VerifyKey, check_signature
from orchestrator.transfer import CHUNK_BYTES, LISTING_BYTES, Meter, MissingError, in_parallel, write_synced

LOOKS = 2  # what arrives broken once may be the network's fault
SPARE_BYTES = 16 << 20  # left free beside a release: folders, listing, signature


class ReleaseReader(ABC):
    """What can be read of a store."""

    uri: str

    def fetch(self, name: str, target: Path, *, verify_key: Path | None = None) -> Release:
        """Download the release `name` into the folder `target`, which appears whole and verified, or not at all.

        verify_key: a public key (PEM) that must have signed the release. Without it, a signature that is there must be
            about these files, whoever made it.

        Raises SpecError if `target` exists and is not an empty folder, PreflightError if the disk is too small,
        PublishError if there is no such release, any byte differs from what was published, or the signature does.
        """
        check_name(name)
        key = None if verify_key is None else VerifyKey.read(verify_key)
        target = target.absolute()
        with self._errors(PublishError, f"cannot fetch {self.uri}/{name}"):
            if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
                raise SpecError(f"{target} exists and is not an empty folder", remedy="choose another folder")
            body = self._need_listing(name)
            release = parse(f"{self.uri}/{name}", body)
            signature = self._get(f"{name}/{SIGNATURE}")
            check_signature(release, signature, key)
            kept = {RELEASE: body, COMPLETE: f"{release.digest}\n".encode()}
            if signature is not None:
                kept[SIGNATURE] = signature
            with _workplace(target, release) as part:
                self._fill(name, release, part)
                for word, data in kept.items():
                    write_synced(part / word, (data,))
                for directory in [path for path in part.rglob("*") if path.is_dir()] + [part]:
                    sync_folder(directory)
                part.replace(target)
                sync_folder(target.parent)
            return release

    def read_signed(self, name: str) -> tuple[Release, bytes | None]:
        """Return what the release `name` lists, and the content of its model.sig, unchecked; None if it is unsigned.

        Raises PublishError if there is no such release.
        """
        check_name(name)
        with self._errors(PublishError, f"cannot read {self.uri}/{name}"):
            return parse(f"{self.uri}/{name}", self._need_listing(name)), self._get(f"{name}/{SIGNATURE}")

    def _fill(self, name: str, release: Release, part: Path) -> None:
        meter = Meter()
        in_parallel(lambda file: self._download(name, file, part / file.key, meter), release.files, meter.stop)
        bill = part / BILL
        if bill.is_file():
            check_bill(release.uri, bill.read_bytes(), release.files)

    def _download(self, name: str, file: StoredFile, path: Path, meter: Meter) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = f"{self.uri}/{name}/{file.key}"
        for _ in range(LOOKS + path.exists()):
            try:
                if self._download_rest(f"{name}/{file.key}", file, path, meter):
                    return
            except MissingError:
                raise PublishError(
                    f"{place} is missing", remedy="run again what published it: missing files are put back"
                ) from None
            path.unlink()
        raise PublishError(
            f"{place} is not what was published: its sha256 or size differs from {RELEASE}", remedy=mend(place)
        )

    def _download_rest(self, key: str, file: StoredFile, path: Path, meter: Meter) -> bool:
        """Append to the file what it lacks; say whether it is now what was published."""
        digest, size = hashlib.sha256(), 0
        with path.open("a+b") as output:
            output.seek(0)
            while chunk := output.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                meter.advance(file, len(chunk))
            if size < file.bytes or not size:
                for chunk in self._read(key, size):
                    size += len(chunk)
                    if size > file.bytes:
                        return False
                    digest.update(chunk)
                    output.write(chunk)
                    meter.advance(file, len(chunk))
            output.flush()
            os.fsync(output.fileno())
        return (digest.hexdigest(), size) == (file.sha256, file.bytes)

    @contextmanager
    def _errors(self, failure: type[OrchestratorError], doing: str) -> Iterator[None]:
        """Turn what the machine or the server says into one message."""
        try:
            yield
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            remedy = "see that the path exists, is readable or writable as needed, and that the disk is not full"
            raise failure(f"{doing}: {error.strerror or error}{place}", remedy=remedy) from None

    @abstractmethod
    def _read(self, key: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes at `key` from `offset` on; MissingError if there is no such key."""

    def _get(self, key: str) -> bytes | None:
        """Return the small object at `key`, or None. PublishError if it is larger than any of ours."""
        data = bytearray()
        try:
            for chunk in self._read(key):
                data += chunk
                if len(data) > LISTING_BYTES:
                    raise PublishError(f"{self.uri}/{key} is too large to be ours", remedy="see who wrote it")
        except MissingError:
            return None
        return bytes(data)

    def _need_listing(self, name: str) -> bytes:
        body = self._read_listing(name)
        if body is None:
            raise PublishError(
                f"there is no complete release {self.uri}/{name}", remedy="check the address, or publish it first"
            )
        return body

    def _read_listing(self, name: str) -> bytes | None:
        """Return the release.json that COMPLETE vouches for; None without COMPLETE."""
        for _ in range(LOOKS):
            seal = self._get(f"{name}/{COMPLETE}")
            if seal is None:
                return None
            body = self._get(f"{name}/{RELEASE}")
            if body is not None and seal.decode("ascii", "replace").strip() == hashlib.sha256(body).hexdigest():
                return body
        raise PublishError(
            f"{self.uri}/{name} is damaged: its {COMPLETE} does not belong to its {RELEASE}",
            remedy="delete this release and publish it again",
        )


def mend(place: str) -> str:
    """Say how a release is mended of a file with the wrong content."""
    return f"delete {COMPLETE} of this release and {place}, then run again what published it"


@contextmanager
def _workplace(target: Path, release: Release) -> Iterator[Path]:
    """Give the hidden folder to fill, with what an earlier pull of the same release left in it; nobody else has it.

    Removes it if what it was filled with was found wrong, or the disk is full; and those of other releases that killed
    pulls into the same target left.
    """
    part = target.parent / f".{target.name}.{release.digest[:16]}.part"
    _check_space(part, release.files)
    for other in target.parent.glob(f".{escape(target.name)}.*.part"):
        if other != part and not other.is_symlink() and other.is_dir():
            with _claim(other) as free:
                if free:
                    shutil.rmtree(other, ignore_errors=True)
    if part.is_symlink():
        part.unlink()
    part.mkdir(parents=True, exist_ok=True)
    with _claim(part) as free:
        if not free:
            raise SpecError(f"another pull into {target} is at work", remedy="wait for it, or choose another folder")
        _tidy(part, release.files)
        try:
            yield part
        except (OrchestratorError, OSError):
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Hold the kernel's lock on a folder; False if somebody else has it, or has just moved the folder away."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(handle)


def _tidy(part: Path, files: Sequence[StoredFile]) -> None:
    """Remove everything from `part` that is not a file of the release, whole or in part. Links are not followed."""
    sizes = {file.key: file.bytes for file in files}
    for place, folders, names in os.walk(part, topdown=False):
        for path in (Path(place, word) for word in (*names, *folders)):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                if not any(path.iterdir()):
                    path.rmdir()
            elif not stat.S_ISREG(status.st_mode) or status.st_size > sizes.get(path.relative_to(part).as_posix(), -1):
                path.unlink()


def _check_space(part: Path, files: Sequence[StoredFile]) -> None:
    """Raise PreflightError unless there is room for what is not there yet."""
    there = sum(path.stat().st_size for path in part.rglob("*") if path.is_file()) if part.is_dir() else 0
    needed = sum(file.bytes for file in files) - there + SPARE_BYTES
    folder = part.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PreflightError(
            f"the release needs {needed / 1e9:,.2f} GB on the disk of {folder}, where {free / 1e9:,.2f} GB are free",
            remedy="free space, or choose a folder on another disk",
        )
