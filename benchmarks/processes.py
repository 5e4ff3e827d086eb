"""Fresh processes, timed; a failure comes back as its reason. Imports no torch, so that it is itself small."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.material import REPOSITORY

TIMEOUT_SECONDS = 3600
THREADS = 2  # what everybody gets


class RunError(Exception):
    """A process failed; says which line it ended with."""


@dataclass(frozen=True)
class Finished:
    """seconds: wall time of the whole process. stdout: what it printed."""

    seconds: float
    stdout: str


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the threads that everybody gets and no hub."""
    threads = str(min(THREADS, os.cpu_count() or 1))
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **more}


def peer_environment() -> dict[str, str]:
    """The same for an environment of its own: of ours, only the runners are on the path."""
    return environment(PYTHONPATH=str(REPOSITORY))


def run(command: Sequence[str | Path], variables: Mapping[str, str], folder: Path = REPOSITORY) -> Finished:
    """Run in a folder. Raises `RunError`."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [str(part) for part in command],
            env=dict(variables),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"took longer than {TIMEOUT_SECONDS} s") from None
    except OSError as error:
        raise RunError(str(error)) from None
    seconds = time.perf_counter() - start
    if done.returncode:
        # Libraries go on talking while they are torn down: the exception, if one is shown, is the reason.
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.partition(":")[0]]
        raise RunError((errors or lines or [f"ended with {done.returncode}"])[-1][:300])
    return Finished(seconds, done.stdout)
