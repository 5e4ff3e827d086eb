"""Immutable artifacts: a folder and its `manifest.json`, named by the sha256 of the manifest.

Below the home folder::

    artifacts/<digest>/      the files of an artifact and manifest.json, which lists each file's sha256
    steps/<fingerprint>.json which artifact a step gave, and what it took to make it
    staging/<fingerprint>/   a step at work, or killed at work; never a result

A step's folder is moved from staging to artifacts in one rename, after its files and its manifest are on disk. So
an artifact is there in whole or not at all, and what a killed step left behind is never taken for a result.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.canonical import canonical_json, file_sha256, sync_folder, sync_tree, write_atomically
from orchestrator.checkpoint import Checkpoint
from orchestrator.errors import SpecError, StepError
from orchestrator.foreign import read_plain
from orchestrator.journal import lease_if_free
from orchestrator.manifest import MOST_BYTES, read_manifest
from orchestrator.remote_code import ModelCode

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
ABANDONED_DAYS = 7
CACHE = "cache"  # what methods keep for each other; every entry is a folder
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Artifact:
    """An artifact in the store."""

    digest: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that the step recorded."""
        return dict(self.manifest["metrics"])

    @property
    def bytes(self) -> int:
        """Size of all files, the manifest aside."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    def damage(self) -> str | None:
        """Read every byte; return what differs from the manifest, or None."""
        expected = self.manifest["files"]
        present = set()
        for path in self.path.rglob("*"):
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                present.add(path.relative_to(self.path).as_posix())
            elif not stat.S_ISDIR(mode):  # a link leads elsewhere, a pipe never ends
                return f"{path.relative_to(self.path).as_posix()} is no plain file"
        present.discard(MANIFEST)
        for name in sorted(present.symmetric_difference(expected)):
            return f"{name} is {'missing' if name in expected else 'not part of the artifact'}"
        for name, entry in expected.items():
            path = self.path / name
            if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
                return f"{name} has changed"
        return None


@dataclass(frozen=True)
class StepRecord:
    """Which artifact a step gave and what it took, beside what was predicted."""

    digest: str
    seconds: float
    peak_memory_bytes: int
    predicted: Mapping[str, Any] | None = None


class ArtifactStore:
    """The artifacts below one home folder."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()

    def record(self, fingerprint: str) -> StepRecord | None:
        """Return what is recorded for a step, without looking at the artifact."""
        try:
            data = json.loads((self.home / "steps" / f"{fingerprint}.json").read_text(encoding="utf-8"))
            took = float(data["seconds"]), int(data["peak_memory_bytes"])
            return StepRecord(str(data["digest"]), *took, data.get("predicted"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None

    def lookup(self, fingerprint: str) -> Artifact | None:
        """Return the artifact that a step gave, its manifest verified, its files not yet; None if there is none."""
        record = self.record(fingerprint)
        return self._open(record.digest) if record else None

    def _open(self, digest: str) -> Artifact | None:
        path = self.home / "artifacts" / digest
        manifest = path / MANIFEST
        try:
            if file_sha256(manifest) != digest:
                return None
            return Artifact(digest, path, json.loads(manifest.read_text(encoding="utf-8")))
        except OSError:  # gone, unreadable, or no folder any more
            return None

    def discard(self, artifact: Artifact) -> None:
        """Move a damaged artifact out of the way, so that it is never used and can still be looked at."""
        target = self.home / "damaged" / artifact.digest
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(target)
        artifact.path.replace(target)

    def stage(self, fingerprint: str, *, keep: bool = False) -> Path:
        """Return a folder to work in, empty unless `keep`: then with what a killed run left there.

        Hold the step's lease.
        """
        folder = self.home / "staging" / fingerprint
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / MANIFEST, *folder.glob(f".{MANIFEST}.*")):  # of a run that was killed while it committed
            path.unlink(missing_ok=True)
        return folder

    def unstage(self, fingerprint: str) -> None:
        """Remove a step's working folder, and those called `fingerprint` with a suffix. Hold the step's lease."""
        for path in self._staged(fingerprint):
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what runs left in staging that were killed and never taken up again.

        A step's folders go if no file of them was touched for `ABANDONED_DAYS`, and nobody is at work on the step; an
        entry of the cache goes if it was not touched for as long.
        """
        staging = self.home / "staging"
        fingerprints = {path.name.partition(".")[0] for path in staging.iterdir()} if staging.is_dir() else ()
        for fingerprint in sorted(fingerprints):
            with lease_if_free(self.home, fingerprint) as free:
                if free and _abandoned(self._staged(fingerprint)):
                    self.unstage(fingerprint)
        cache = self.home / CACHE
        for entry in sorted(cache.iterdir()) if cache.is_dir() else ():
            if _abandoned([entry]):
                _remove(entry)

    def _staged(self, fingerprint: str) -> list[Path]:
        staging = self.home / "staging"
        return [*staging.glob(fingerprint), *sorted(staging.glob(f"{fingerprint}.*"))]

    def commit(
        self,
        fingerprint: str,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        seconds: float,
        peak_memory_bytes: int,
        predicted: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Turn a finished working folder into an artifact and remember it as the step's result.

        predicted: what the step was expected to take; kept beside what it took, outside of the manifest.
        """
        files = {
            path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        if MANIFEST in files:
            raise StepError(f"the step wrote a file called {MANIFEST}, which is the core's own")
        content = canonical_json({"schema": SCHEMA_VERSION, "fingerprint": fingerprint, **facts, "files": files})
        write_atomically(folder / MANIFEST, content)
        sync_tree(folder)
        digest = file_sha256(folder / MANIFEST)
        # The record comes first: killed between the two, the step finds its folder still staged, not its work gone.
        steps = self.home / "steps"
        steps.mkdir(parents=True, exist_ok=True)
        record = {"digest": digest, "seconds": round(seconds, 6), "peak_memory_bytes": peak_memory_bytes}
        record |= {} if predicted is None else {"predicted": dict(predicted)}
        write_atomically(steps / f"{fingerprint}.json", canonical_json(record))
        final = self.home / "artifacts" / digest
        final.parent.mkdir(parents=True, exist_ok=True)
        known = self._open(digest)
        if known and known.damage() is None:
            shutil.rmtree(folder)
        else:
            _remove(final)
            folder.replace(final)
            sync_folder(final.parent)
        return Artifact(digest, final, json.loads(content))

    def find(self, reference: str) -> Artifact:
        """Return the artifact with this digest, a unique prefix of it (4 characters at least), or at this path.

        Raises `SpecError` if there is none or more than one.
        """
        if _is_folder(reference):
            return _open_folder(Path(reference))
        whole = self._open(reference) if _DIGEST.fullmatch(reference) else None
        if whole:  # every step asks so for its input: no need to list a store that may be large
            return whole
        folder = self.home / "artifacts"
        known = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        matches = [digest for digest in known if digest.startswith(reference)] if len(reference) >= 4 else []
        if len(matches) > 1:
            raise SpecError(f"{reference!r} is the beginning of {len(matches)} digests", remedy="give more characters")
        artifact = self._open(matches[0]) if matches else None
        if artifact is None:
            raise SpecError(
                f"there is no artifact {reference!r} in {self.home}",
                remedy="give a digest (or the first 4 characters of one) as `orchestrator plan` shows it, a path, "
                "or models:/NAME@ALIAS",
            )
        return artifact


def model_digest(artifact: Artifact) -> str:
    """Return `Checkpoint.digest` of a model artifact, from what its manifest knows already."""
    files = artifact.manifest["files"]
    return model_of(artifact).digest(lambda path: str(files[path.name]["sha256"]))


def model_of(artifact: Artifact) -> Checkpoint:
    """Return the model in a model artifact, to be looked at: code that comes with it does not run."""
    return Checkpoint(artifact.path, code=ModelCode.recorded(artifact.manifest["identity"]))


def _is_folder(reference: str) -> bool:
    try:
        return Path(reference).is_dir()
    except (OSError, ValueError):  # no path at all: too long, or with a NUL
        return False


def _open_folder(path: Path) -> Artifact:
    """The artifact at a path that the user gave."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise SpecError(f"{path} is no artifact: it holds no {MANIFEST}", remedy="give the folder of an artifact")
    try:
        data = read_plain(manifest, MOST_BYTES)
        content = read_manifest(data)
    except (OSError, ValueError) as error:
        remedy = "name another artifact, or run again what made it"
        raise SpecError(f"{manifest} is no manifest: {error}", remedy=remedy) from None
    return Artifact(hashlib.sha256(data).hexdigest(), path, content)


def _abandoned(folders: list[Path]) -> bool:
    """Whether nothing in these folders was touched for `ABANDONED_DAYS`."""
    inside = [path for folder in folders for path in folder.rglob("*")]
    touched = max((path.lstat().st_mtime for path in (*folders, *inside)), default=math.inf)
    return time.time() - touched > ABANDONED_DAYS * 86400


def _remove(path: Path) -> None:
    """Remove a folder, or whatever else has come to stand in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
