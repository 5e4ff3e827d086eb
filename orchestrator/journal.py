"""The run journal and the leases: what happened, and who is at work. Both survive ``kill -9``.

The journal is append-only JSON lines, each flushed to disk before the run goes on. A lease is a kernel lock on a
file, which the kernel releases when its holder dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.canonical import canonical_json
from orchestrator.errors import PreflightError

if TYPE_CHECKING:
    from orchestrator.presence import Presence


class Journal:
    """One run's journal, ``<home>/runs/<run id>.jsonl``."""

    def __init__(self, home: Path, run_id: str | None = None) -> None:
        self.run_id = run_id or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        self.path = home / "runs" / f"{self.run_id}.jsonl"
        with written(home):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._home = home
        self._presence: Presence | None = None

    def begin(self, tracking: str = "", **facts: Any) -> None:
        """Write that the run has started. From now on, whoever looks sees that it is at work (`presence`).

        tracking: the address of MLflow without passwords, for those who have to end there what this run began. Raises
        `PreflightError` if that cannot be written.
        """
        from orchestrator.presence import RUN, enter

        known = {name: facts[name] for name in ("pipeline", "spec", "engine") if name in facts}
        self._presence = enter(self._home, RUN, self.run_id, tracking=tracking, **known)
        try:
            with written(self._home):
                self.write("run started", **facts)
        except PreflightError:
            self._presence.leave()
            raise

    @contextmanager
    def ending(self, whole: Callable[[], bool]) -> Iterator[None]:
        """Write the run's end in this block; once it is left without an error, and whole, there is nothing to heal.

        Raises `PreflightError` for an `OSError` in the block.
        """
        try:
            with written(self._home):
                yield
        except BaseException:
            if self._presence:
                self._presence.give_up()
            raise
        if self._presence:
            self._presence.leave() if whole() else self._presence.give_up()

    def write(self, event: str, **facts: Any) -> None:
        """Append one event; returns once it is on disk."""
        line = canonical_json({"time": round(time.time(), 3), "event": event, **facts}) + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def events(self) -> list[dict[str, Any]]:
        """All events of the run; a line torn by a crash is left out."""
        events = []
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):  # texts in it may hold what else ends a line
                try:
                    events.append(json.loads(line))
                except (ValueError, RecursionError):
                    continue
        return events


@contextmanager
def written(home: Path) -> Iterator[None]:
    """What the file system of the home refuses in this block is a `PreflightError` that names the home."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space there, then run again" if full else "see to its disk and its rights, then run again"
        raise PreflightError(
            f"the home folder {home} takes no files: {error.strerror or error}", remedy=remedy
        ) from None


@contextmanager
def lease(home: Path, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the kernel lock called `name`; call `waiting` once if somebody else holds it."""
    descriptor = _lock_file(home, name)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lease_if_free(home: Path, name: str) -> Iterator[bool]:
    """Hold the kernel lock called `name` if nobody else does; gives whether it is held."""
    descriptor = _lock_file(home, name)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _lock_file(home: Path, name: str) -> int:
    path = home / "locks" / name
    with written(home):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
