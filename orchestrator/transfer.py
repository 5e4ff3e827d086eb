"""What publishing and pulling share: threads that stop together, what is reported, and what storage may answer."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from orchestrator.release import StoredFile

FILES_AT_ONCE = 16  # a small file is mostly waiting for the server
ATTEMPTS = 5
CHUNK_BYTES = 1 << 20
RECORD_BYTES = 1 << 20
LISTING_BYTES = 64 << 20  # no release.json and no signature of ours is larger; a hostile store's may be endless

Progress = Callable[[str, int], None]
T = TypeVar("T")


class TakenError(Exception):
    """The key exists, or somebody is creating it right now."""


class MissingError(Exception):
    """There is no such key."""


class StoppedError(Exception):
    """Another part of the same work failed, or the user interrupted it."""


class Meter:
    """Follows the bytes of one publish or fetch.

    Calls the caller's progress function: one call at a time, and per file never more than its size in total. Once
    `stop` is set, ends the workers at the next bytes they report, so that an interrupt need not wait for whole files.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self.stop = threading.Event()
        self._seen: Counter[str] = Counter()

    def advance(self, file: StoredFile, amount: int) -> None:
        if self.stop.is_set():
            raise StoppedError
        with self._lock:
            amount = min(amount, file.bytes - self._seen[file.key])
            self._seen[file.key] += amount
            if self._progress and amount:
                self._progress(file.key, amount)


def in_parallel(work: Callable[[T], None], items: Iterable[T], stop: threading.Event) -> None:
    """Call work(item) for every item; the first failure sets `stop`, cancels what has not begun, and is raised."""
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        futures = [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    """Create the file `path` and flush it to disk; FileExistsError if it is there."""
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
