"""Peak memory and time of a stretch of work in this process."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Usage:
    """Measures from its creation on.

    On Linux the kernel's high-water mark of resident memory is reset first, so that the peak is this stretch's own;
    elsewhere it is the peak of the process so far.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # not Linux, or a kernel without it: the peak is then the process's
            _CLEAR_REFS.write_text("5", encoding="ascii")
        self._start = time.perf_counter()
        self.started_ms = time.time_ns() // 1_000_000

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def peak_memory_bytes(self) -> int:
        """Largest resident memory of the process, bytes."""
        try:
            match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            match = None
        if match:
            return int(match[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
