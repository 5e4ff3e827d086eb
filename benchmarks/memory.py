"""How peak memory grows with the depth of the model and with the calibration set (`benchmarks.walk --memory`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results, targets
from benchmarks.material import REPOSITORY, split_text
from benchmarks.ours import Calibration
from benchmarks.processes import environment
from benchmarks.systems import OURS, Measured, Work, make_windows, measure
from benchmarks.targets import Target

CASE = "W4g128"
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 768, 2048, 12, 4
LAYERS, SEQUENCES, LENGTH = 12, 16, 512
QUICK_LAYERS, QUICK_SEQUENCES, QUICK_LENGTH = 2, 4, 128
# What doubling the depth, and the number of sequences, may add, as a share of the peak above torch.
GROWTH_LIMIT = 1.05
MIB = 2**20


def compare(text: Path, folder: Path, systems: Sequence[str], *, quick: bool, save: bool) -> None:
    """Measure everybody at two depths, and with twice the sequences; print the table."""
    layers, sequences, length = (QUICK_LAYERS, QUICK_SEQUENCES, QUICK_LENGTH) if quick else (LAYERS, SEQUENCES, LENGTH)
    calibration_text, _ = split_text(text, folder)
    settings = {
        "plain": (layers, sequences),
        "twice the depth": (2 * layers, sequences),
        "twice the sequences": (layers, 2 * sequences),
    }
    measured: dict[str, dict[str, Measured]] = {system: {} for system in systems}
    for label, (depth, count) in settings.items():
        model = folder / f"random-{depth}"
        if not model.exists():
            make_model(model, depth)
        windows = folder / f"windows-{count}.safetensors"
        make_windows(model, calibration_text, windows, count, length)
        work = Work(model, Calibration(calibration_text, count, length), windows, dtype="auto")
        for system in systems:
            one = measure(system, CASE, work, folder / "run")
            measured[system][label] = one
            print(f"{label}, {system}: {one.failed or f'{one.seconds:.1f} s'}", flush=True)
    show(measured, layers, sequences, length)
    aimed = aims(measured)
    targets.show(aimed)
    if save:
        results.save(
            "memory",
            {
                **results.circumstances(),
                "quick": quick,
                "case": CASE,
                "model": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "layers": layers},
                "calibration": {"sequences": sequences, "length_tokens": length},
                "runs": {
                    system: {label: one.record() for label, one in ones.items()} for system, ones in measured.items()
                },
                "targets": [target.record() for target in aimed],
            },
        )


def make_model(folder: Path, layers: int) -> None:
    """In a process of its own, so that this one stays small."""
    shape = {
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "layers": layers,
        "heads": HEADS,
        "kv-heads": KV_HEADS,
        "positions": LENGTH,
    }
    options = [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.random_model", str(folder), *options]
    subprocess.run(command, env=environment(), cwd=REPOSITORY, check=True)


def show(measured: dict[str, dict[str, Measured]], layers: int, sequences: int, length: int) -> None:
    """Print peaks above torch, and what they grew to."""
    print(f"\n{CASE}, {layers} layers of width {HIDDEN}/{INTERMEDIATE}, {sequences} x {length} tokens.")
    print("Peak above an interpreter that has imported torch, MiB; in brackets, as a multiple of the first column.\n")
    labels = list(next(iter(measured.values())))
    print(f"{'':<16}" + "".join(f"{label:>24}" for label in labels))
    for system, ones in measured.items():
        cells = ""
        for label in labels:
            above, first = ones[label].above_bytes, ones[labels[0]].above_bytes
            if above is None:
                cells += f"{'failed':>24}"
            else:
                cells += f"{f'{above / MIB:.0f} ({above / first:.2f})' if first else f'{above / MIB:.0f}':>24}"
        print(f"{system:<16}{cells}")
    for system, ones in measured.items():
        for label, one in ones.items():
            if one.failed:
                print(f"{system}, {label}: failed: {one.failed}")


def aims(measured: dict[str, dict[str, Measured]]) -> list[Target]:
    """Memory that does not depend on depth or samples, and is less than anybody else's."""
    mine = measured.get(OURS, {})
    plain = mine["plain"].above_bytes if mine else None
    found = []
    for label in ("twice the depth", "twice the sequences"):
        above = mine[label].above_bytes if mine else None
        found.append(Target(f"ours at {label} / plain", GROWTH_LIMIT, above / plain if above and plain else None))
    for label in ("plain", "twice the depth", "twice the sequences"):
        own = mine[label].above_bytes if mine else None
        others = [ones[label].above_bytes for system, ones in measured.items() if not system.startswith(OURS)]
        smallest = min((above for above in others if above is not None), default=None)
        ratio = own / smallest if own is not None and smallest else None
        found.append(Target(f"ours / the smallest other's, {label}", 0.5, ratio))
    return found
