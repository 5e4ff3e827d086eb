"""This machine: its memory, disk and threads, and what earlier runs taught about its speed. Imports no torch.

``$ORCHESTRATOR_HOME/machine.json`` keeps, small and written atomically, of each step that was computed: seconds beside
the work that was estimated, what the libraries take in memory, what importing them takes. It is a memory of the
machine, never an input of a result; without it defaults are used. Two runs that write it at once may lose a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.canonical import canonical_json, write_atomically
from orchestrator.errors import PreflightError
from orchestrator.work import Work

MEMORY_VARIABLE = "ORCHESTRATOR_MAX_MEMORY_GIB"
# Without any measurement: one thread of a server core of 2023, and Python with torch, Transformers and MLflow.
OPERATIONS_PER_SECOND = 5e10
BYTES_PER_SECOND = 4e9
SECONDS_PER_CALL = 8e-6
DEFAULT_OVERHEAD_SECONDS = 0.5
DEFAULT_IMPORT_SECONDS = 4.0
DEFAULT_BASE_BYTES = 650 << 20
_KEPT = 12  # measurements of each kind of step
_KEPT_KEYS = 256
_DOUBT = 0.03  # weight of what is assumed beside what was measured
_SPREAD_SECONDS = 5.0  # how far the overhead may well be from what is assumed: a plugin imports libraries of its own
_FILE = "machine.json"


@dataclass(frozen=True)
class Machine:
    """What there is to work with.

    memory_bytes: what this process could still take. disk_bytes: free where the home is. threads: as many as torch
    would use.
    """

    memory_bytes: int
    disk_bytes: int
    threads: int

    @classmethod
    def here(cls, home: Path) -> Machine:
        """Look at this machine."""
        place = home.absolute()
        while not place.exists():
            place = place.parent
        return cls(available_memory(), shutil.disk_usage(place).free, num_threads(os.environ))


@dataclass
class Experience:
    """What earlier runs measured on this machine.

    base_bytes: by engine and step, what the process took after the step, its model gone. seconds: by step, pairs of
    (seconds by the default rates, seconds measured). recorded: calibrations whose dense records were kept.
    fitting: models that the walk can take apart (`orchestrator.fit`).
    """

    base_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    engine: str = "local"
    import_seconds: float = DEFAULT_IMPORT_SECONDS
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    recorded: list[str] = field(default_factory=list)
    fitting: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, home: Path) -> Experience:
        """Return what is remembered; nothing if the file is missing or damaged."""
        try:
            data = json.loads((home / _FILE).read_text(encoding="utf-8"))
            return cls(
                {str(e): {str(k): int(v) for k, v in found.items()} for e, found in data["base_bytes"].items()},
                str(data["engine"]),
                float(data["import_seconds"]),
                {str(k): [(float(a), float(b)) for a, b in pairs] for k, pairs in data["seconds"].items()},
                [str(key) for key in data["recorded"]],
                [str(key) for key in data["fitting"]],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, home: Path) -> None:
        """Keep it. A disk that is full is not this file's business."""
        with contextlib.suppress(OSError):
            write_atomically(home / _FILE, canonical_json(vars(self)))

    def base(self, step: str, engine: str | None = None) -> int:
        """Bytes that interpreter and libraries take in a step: of this kind, else the most of any."""
        found = self.base_bytes.get(engine or self.engine) or next(iter(self.base_bytes.values()), {})
        return found.get(step) or max(found.values(), default=DEFAULT_BASE_BYTES)

    def predict(self, step: str, nominal: float) -> float:
        """Seconds of a step that would take `nominal` by the default rates."""
        overhead, ratio = self._fit(step)
        return overhead + ratio * nominal

    def learn(self, step: str, nominal: float, seconds: float) -> None:
        """Remember what a step took."""
        pairs = self.seconds.setdefault(step, [])
        pairs.append((round(nominal, 4), round(max(seconds, 1e-3), 4)))
        del pairs[:-_KEPT]

    def learn_record(self, key: str) -> None:
        """Remember that the records of this calibration were kept."""
        self.recorded = _latest(self.recorded, key)

    def learn_fit(self, key: str) -> None:
        """Remember that the walk can take this model apart."""
        self.fitting = _latest(self.fitting, key)

    def _fit(self, step: str) -> tuple[float, float]:
        """Overhead and ratio with the least relative error over the measurements, drawn a little to what is assumed."""
        others = [pair for name, pairs in self.seconds.items() if name != step for pair in pairs]
        slow = sum(took for _, took in others if took > 1)
        usual = slow / max(sum(nominal for nominal, took in others if took > 1), 1e-9) if slow else 1.0
        usual = min(max(usual, 0.1), 10.0)
        return fit_line(self.seconds.get(step, ()), (DEFAULT_OVERHEAD_SECONDS, usual))


def _latest(keys: Sequence[str], key: str) -> list[str]:
    return [*(other for other in keys if other != key), key][-_KEPT_KEYS:]


def fit_line(pairs: Sequence[tuple[float, float]], assumed: tuple[float, float]) -> tuple[float, float]:
    """Return (a, b) of seconds = a + b * nominal, neither negative.

    Least squares of relative errors, with `assumed` counting as `_DOUBT` of one measurement for each of the two.
    """
    a0, b0 = assumed
    saa, sab, sbb = _DOUBT / _SPREAD_SECONDS**2, 0.0, _DOUBT / b0**2
    sa, sb = a0 * saa, b0 * sbb
    for nominal, seconds in pairs:
        saa += 1 / seconds**2
        sab += nominal / seconds**2
        sbb += (nominal / seconds) ** 2
        sa += 1 / seconds
        sb += nominal / seconds
    determinant = saa * sbb - sab * sab
    a, b = (sa * sbb - sb * sab) / determinant, (saa * sb - sab * sa) / determinant
    if a < 0:
        return 0.0, sb / sbb
    if b < 0:
        return sa / saa, 0.0
    return a, b


def nominal_seconds(work: Work, threads: int = 1) -> float:
    """Seconds by the default rates; products are spread over threads."""
    operations = work.operations / OPERATIONS_PER_SECOND / threads
    return operations + work.moved_bytes / BYTES_PER_SECOND + work.calls * SECONDS_PER_CALL


def memory_limit(environment: Mapping[str, str]) -> int | None:
    """Bytes that `ORCHESTRATOR_MAX_MEMORY_GIB` allows. Raises `PreflightError` for what is no positive number."""
    text = environment.get(MEMORY_VARIABLE)
    if not text:
        return None
    try:
        gib = float(text)
        if not 0 < gib <= 100_000:
            raise ValueError(text)
    except ValueError:
        raise PreflightError(f"{MEMORY_VARIABLE} is {text!r}, not a number of GiB", remedy="write 8, or 1.5") from None
    return int(gib * 2**30)


def num_threads(environment: Mapping[str, str]) -> int:
    """Threads that torch would use: those of the environment, else one for each core that this process may use."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        match = re.match(r"[1-9]\d*", environment.get(name, ""))
        if match:
            return int(match[0])
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for number in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(_text(siblings) or str(number))
    return len(cores)


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its control group if that has less."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    free = int(match[1]) * 1024 if match else 1 << 62
    group = re.search(r"^0::(/.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    root = Path("/sys/fs/cgroup")
    for folder in {root, root / group[1].lstrip("/") if group else root}:
        limit, used = _text(folder / "memory.max"), _text(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            # Files that are merely cached are given up when memory is asked for.
            cached = re.findall(r"^(?:in)?active_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
            free = min(free, int(limit) - int(used) + sum(map(int, cached)))
    return max(free, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
