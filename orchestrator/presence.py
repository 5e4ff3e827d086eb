"""Who is at work in a home: a file of facts for each, under a kernel lock that the kernel gives up with the process.

So a run that was killed is told from one that is at work without asking a clock, a process table or a server: its file
is there and its lock is free. A file appears already locked, by a rename; its name is never used again.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from orchestrator.canonical import canonical_json
from orchestrator.errors import OverlapError
from orchestrator.journal import lease_if_free, written

RUN = "run"
FLOW_RUN = "flow-run"
_MOST_BYTES = 1 << 20
_TRIES = 5  # somebody may look at the moment that we want to take
_TRY_SECONDS = 0.02
_ENTERING_SECONDS = 3600.0  # a file that has not got its name by then belongs to nobody
_WEEK_SECONDS = 7 * 86400.0


@dataclass
class Presence:
    """Somebody who is at work in this process, until `leave` or until the process ends."""

    path: Path
    facts: dict[str, Any]
    _file: IO[bytes] = field(repr=False)

    def add(self, **facts: Any) -> None:
        """Add facts for those who look. Raises `PreflightError` if the disk is full."""
        self.facts |= facts
        content = canonical_json(self.facts)
        with written(self.path.parent.parent):
            os.pwrite(self._file.fileno(), content.ljust(os.fstat(self._file.fileno()).st_size), 0)
            os.fsync(self._file.fileno())

    def leave(self) -> None:
        """Be gone, with nothing left to heal."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        self._file.close()

    def give_up(self) -> None:
        """Be gone, with something left to heal."""
        self._file.close()


@dataclass(frozen=True)
class Seen:
    """What is known of somebody who is, or was, at work. `alive`: the lock was held at the time of looking."""

    path: Path
    facts: dict[str, Any]
    alive: bool

    @property
    def name(self) -> str:
        """The id of the run."""
        return str(self.facts.get("name", ""))

    @property
    def here(self) -> bool:
        """Whether it is, or was, a process of this machine: of no other can a free lock be trusted everywhere."""
        return self.facts.get("host") == socket.gethostname()

    @property
    def long_gone(self) -> bool:
        """Whether it came more than a week ago, or in the future: long enough to have told people about it."""
        since = self.facts.get("since")
        return not isinstance(since, int | float) or abs(time.time() - since) > _WEEK_SECONDS

    def __str__(self) -> str:
        since = self.facts.get("since", 0)
        told = moment(since) if isinstance(since, int | float) else "?"
        user, host, process = (self.facts.get(name, "?") for name in ("user", "host", "pid"))
        return f"{self.name}, of {user} on {host}, process {process}, since {told}"

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Hold the lock of one that is gone; gives whether that worked. Call `forget` inside when all is healed."""
        try:
            file = self.path.open("r+b")
        except FileNotFoundError:  # somebody else healed it
            yield False
            return
        with file:
            yield _locked(file) and os.fstat(file.fileno()).st_nlink > 0

    def forget(self) -> None:
        """Remove the file."""
        with suppress(FileNotFoundError):
            self.path.unlink()


def enter(home: Path, kind: str, name: str, **facts: Any) -> Presence:
    """Be at work in `home` from now on. kind: `RUN` or `FLOW_RUN`; name: its id.

    Raises `PreflightError` if nothing can be written there.
    """
    folder = home / "locks"
    token = secrets.token_hex(4)
    entering = folder / f".{kind}-{token}"
    known = {"name": name, "host": socket.gethostname(), "user": _user(), "pid": os.getpid(), "since": time.time()}
    with written(home), ExitStack() as undo:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        file = undo.enter_context(entering.open("x+b"))
        undo.callback(entering.unlink)
        fcntl.flock(file, fcntl.LOCK_EX)
        presence = Presence(folder / f"{kind}-{name}.{token}", known, file)
        presence.add(**facts)
        entering.rename(presence.path)
        undo.pop_all()
    return presence


def look(home: Path, kind: str) -> list[Seen]:
    """Everybody of a kind who is at work in `home`, or was killed there; first come, first."""
    found = []
    for path in (home / "locks").glob(f"{kind}-*.*"):
        try:
            with path.open("rb") as file:
                alive = not _locked(file, shared=True)
                facts = json.loads(file.read(_MOST_BYTES))
        except (OSError, ValueError, RecursionError):  # it left, or is no file of ours
            continue
        if isinstance(facts, dict):
            found.append(Seen(path, facts, alive))
    return sorted(found, key=lambda seen: str(seen.facts.get("since")))


@contextmanager
def alone(home: Path, pipeline: str) -> Iterator[None]:
    """Be the only one who runs `pipeline` in `home`, or raise `OverlapError` at once. Who waits may come meanwhile."""
    with lease_if_free(home, f"alone-{pipeline}") as free:
        at_work = [seen for seen in look(home, RUN) if seen.alive and seen.facts.get("pipeline") == pipeline]
        if not free and not at_work:  # it is planning
            at_work = [seen for seen in look(home, FLOW_RUN) if seen.alive and seen.facts.get("pipeline") == pipeline]
            at_work = [seen for seen in at_work if seen.facts.get("pid") != os.getpid()]
        if at_work or not free:
            raise OverlapError(
                f"{pipeline} is at work already: {at_work[0] if at_work else 'somebody who has just begun'}",
                remedy="what it finishes is found in the store: let it end, or stop it, then run again",
            )
        yield


def moment(seconds: float) -> str:
    """A time in seconds since the epoch, as people read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _sweep(folder: Path) -> None:
    """Remove files of those who never came: they were killed, or the disk was full."""
    for path in [*folder.glob(f".{RUN}-*"), *folder.glob(f".{FLOW_RUN}-*")]:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ENTERING_SECONDS:
                path.unlink()


def _locked(file: IO[bytes], *, shared: bool = False) -> bool:
    """Lock the file unless somebody holds it; who looks shares."""
    for _ in range(1 if shared else _TRIES):
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0 if shared else _TRY_SECONDS)
    return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
