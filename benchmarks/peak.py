"""Peak resident memory of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Return the high-water mark. The kernel's own is used on Linux: `ru_maxrss` also counts what the parent had."""
    try:
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Print the peak of an interpreter that has imported torch: what every other process is measured above."""
    import torch  # noqa: F401

    print(peak_bytes())


if __name__ == "__main__":
    main()
