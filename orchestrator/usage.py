"""Peak memory and time of a stretch of work in this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.work import KEPT_PIECE_BYTES

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 << 20  # at the end of a heap
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
        if cuda := _cuda():
            cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        self.started_ms = time.time_ns() // 1_000_000

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def peak_memory_bytes(self) -> int:
        """Largest resident memory of the process, bytes."""
        peak = _status("VmHWM")
        if peak is not None:
            return peak
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @property
    def peak_device_bytes(self) -> int | None:
        """Most memory that torch had in use on an accelerator, bytes; None without one."""
        cuda = _cuda()
        return int(cuda.max_memory_allocated()) if cuda else None


def resident_bytes() -> int:
    """Resident memory of the process now; 0 where the system does not tell."""
    return _status("VmRSS") or 0


def base_bytes() -> int:
    """Resident memory after everything that nobody uses any more has been given back."""
    gc.collect()
    give_back_memory()
    return resident_bytes()


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps it otherwise, and blocks would seem to pile up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reuse_memory() -> None:
    """Let glibc keep what is freed until `give_back_memory`, up to a limit, for the rest of the process.

    Left alone it gives activations back after every operation and asks for them again: the kernel clears every page
    anew, which takes a tenth of the walk of a small model. Large pieces still come and go one by one: there it hardly
    costs time, and heaps would be left with holes of their size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT_PIECE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def has_torch() -> bool:
    """Whether the libraries that compute are imported already."""
    return {"torch", "transformers"} <= sys.modules.keys()


def _status(name: str) -> int | None:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _cuda() -> Any:
    """torch.cuda once something has used it, else None; imports nothing."""
    torch = sys.modules.get("torch")
    used = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda if torch is not None and used else None


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch says so by a RuntimeError, with a class of its own for accelerators alone."""
    allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or allocator or type(error).__name__ == "OutOfMemoryError"
