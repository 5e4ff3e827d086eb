"""A process that has imported everything and forks a child for each trial: a start costs milliseconds, not seconds.

`python -m tests.faults.zygote` reads requests from standard input, one JSON object a line, and answers each with one.
Forking is safe here because the parent never runs a torch operation and has one Python thread: no pool of threads
exists that a child could miss.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Zygote:
    """The client's side."""

    def __init__(self, threads: int = 1) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins"), str(ROOT / "flows")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def trial(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one request in a child of its own: {"exit": code or minus the signal, "seconds", "errors"}.

        request: as in `tests.faults.victim.run`; also `kill_after`, seconds, and `limit`, after which the child counts
        as hung ({"exit": None}).
        """
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    from tests.faults.points import import_targets
    from tests.faults.victim import run

    import_targets()
    if threading.active_count() != 1:
        raise RuntimeError("the zygote has threads; forking would not be safe")
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        errors = Path(request["log"]).with_suffix(".stderr")
        child = os.fork()
        if child == 0:
            descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = 99
            try:
                code = run(request)
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = _wait(child, request.get("kill_after"), request.get("limit", 60.0))
        answer = {
            "exit": code,
            "seconds": time.monotonic() - started,
            "errors": errors.read_text(encoding="utf-8", errors="replace")[-3000:],
        }
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answer


def _wait(child: int, kill_after: float | None, limit: float) -> int | None:
    """Wait for a child, killing it when it is told to or takes too long: None then."""
    started = time.monotonic()
    pause = 0.0005
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        if (kill_after is not None and elapsed >= kill_after) or elapsed > limit:
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return None if elapsed > limit else code
        time.sleep(pause)
        pause = min(pause * 1.2, 0.01)


if __name__ == "__main__":
    _serve()
