"""sha256 of large files that rarely change, remembered by path, size, inode and time of change.

Only `plan` relies on what is remembered; `run` reads every byte.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from orchestrator.canonical import canonical_json, file_sha256, write_atomically

_SETTLED_SECONDS = 2.0  # a file younger than this may change again within one tick of its clock


class FileDigests:
    """sha256 by file. `home` None, or `trust` False: everything is read."""

    def __init__(self, home: Path | None, *, trust: bool) -> None:
        self._path = home / "file-digests.json" if home else None
        self._trust = trust
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        if self._path and self._path.is_file():
            try:
                known = json.loads(self._path.read_text(encoding="utf-8"))
                self._known = {str(name): entry for name, entry in known.items() if isinstance(entry, list)}
            except (OSError, ValueError, AttributeError, RecursionError):
                self._known = {}

    def sha256(self, path: Path) -> str:
        """Return the sha256 (hex) of a file."""
        path = path.absolute()
        stat = path.stat()
        state: list[int | str] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self._known.get(str(path))
        if self._trust and known and known[:-1] == state:
            return str(known[-1])
        digest = file_sha256(path)
        if time.time() - stat.st_ctime > _SETTLED_SECONDS and known != [*state, digest]:
            self._known[str(path)] = [*state, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Remember what was read. A home that cannot be written only costs the next plan time."""
        if self._path and self._changed and self._path.parent.is_dir():
            try:
                write_atomically(self._path, canonical_json(self._known))
            except OSError:
                return
