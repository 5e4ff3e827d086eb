"""One-shot compression beside the peers: time, memory and perplexity, in one run on one machine.

    python -m benchmarks.walk [--quick] [--repeats N] [--model DIR] [--text FILE] [--save]
    python -m benchmarks.walk --memory [--quick] [--save]

All compress the same model on the same token windows with the same options (GPTQ: symmetric groups of 128, columns in
their own order, damping 0.01, layers of a block together, `lm_head` left alone; Wanda: half of every row, or 2:4),
each in a fresh process with the same threads. The first half of the text is calibrated on, the second evaluated.
Every result is evaluated by the same stock Transformers code, as is the dense model.

Peers compute in float32, as this project does. With `--memory` they load a model in the checkpoint's own dtype, which
is what they need least memory with.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import memory, results, targets
from benchmarks.cases import CASES, WALK
from benchmarks.material import shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.processes import RunError
from benchmarks.systems import (
    OURS,
    OURS_DENSE,
    REFERENCE,
    SYSTEMS,
    Measured,
    Work,
    evaluate,
    make_windows,
    measure,
    perplexity,
    supports,
)
from benchmarks.targets import Target

# Ours divided by: the fastest other, the smallest other, the best other.
SECONDS_LIMIT = 0.5
MEMORY_LIMIT = 0.5
PERPLEXITY_LIMIT = 1.0
MIB = 2**20


def main() -> None:
    """Measure, print the tables, and save them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and short windows: does everything run?")
    parser.add_argument("--repeats", type=int, default=1, help="of each compression; medians are shown")
    parser.add_argument("--model", type=Path, help="a dense Llama-like checkpoint; default reference-7m")
    parser.add_argument("--text", type=Path, help="halved to calibrate and to evaluate; default heldout-code.txt")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=WALK)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--memory", action="store_true", help="peak memory of random models of two depths instead")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--name", default="walk", help="of the file that --save writes")
    arguments = parser.parse_args()
    text = arguments.text or shared_data() / "text" / "heldout-code.txt"
    with tempfile.TemporaryDirectory() as name:
        if arguments.memory:
            memory.compare(text, Path(name), arguments.systems, quick=arguments.quick, save=arguments.save)
            return
        model = arguments.model or shared_data() / "models" / "reference-7m"
        compare(model.resolve(), text, Path(name), arguments)


def compare(model: Path, text: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """The comparison on one model."""
    quick = arguments.quick
    sequences, length, evaluated = (8, 256, 16) if quick else (64, 512, 117)
    calibration_text, evaluation_text = split_text(text, folder)
    windows, held_out = folder / "windows.safetensors", folder / "held-out.safetensors"
    make_windows(model, calibration_text, windows, sequences, length)
    make_windows(model, evaluation_text, held_out, evaluated, 512, in_order=True)
    dense = perplexity(model, held_out)
    work = Work(model, Calibration(calibration_text, sequences, length), windows)
    measured = []
    for case in arguments.cases:
        measured += measure_case(case, arguments.systems, work, held_out, folder, arguments.repeats)
    show(measured, dense)
    aimed = aims(measured)
    targets.show(aimed)
    if arguments.save:
        results.save(
            arguments.name,
            {
                **results.circumstances(),
                "quick": quick,
                "model": model.name,
                "text": text.name,
                "calibration": {"sequences": sequences, "length_tokens": length},
                "evaluation": {"windows": evaluated, "length_tokens": 512},
                "repeats": arguments.repeats,
                "dense_perplexity": dense,
                "runs": [one.record() for one in measured],
                "targets": [target.record() for target in aimed],
            },
        )


def measure_case(
    case: str, systems: Sequence[str], work: Work, held_out: Path, folder: Path, repeats: int
) -> list[Measured]:
    """Measure one case by everybody that has it, round-robin so that load hits all alike."""
    those = [system for system in systems if supports(system, case)]
    found: dict[str, list[Measured]] = {system: [] for system in those}
    for repeat in range(repeats):
        for system in those:
            one = measure(system, case, work, folder / "run")
            if repeat == 0:  # the repeats give the same weights
                evaluate(one, work.model, held_out)
            found[system].append(one)
            print(f"{case}, {system}: {one.failed or f'{one.seconds:.1f} s'}", flush=True)
    return [median(ones) for ones in found.values()]


def median(ones: Sequence[Measured]) -> Measured:
    """The first with the medians of all; any failure counts."""
    first = next((one for one in ones if one.failed), ones[0])
    if first.failed is None:
        first.seconds = statistics.median(one.seconds for one in ones if one.seconds is not None)
        first.process_seconds = statistics.median(one.process_seconds for one in ones if one.process_seconds)
        first.peak_bytes = int(statistics.median(one.peak_bytes for one in ones if one.peak_bytes))
        first.above_bytes = int(statistics.median(one.above_bytes for one in ones if one.above_bytes is not None))
    return first


def show(measured: Sequence[Measured], dense: float) -> None:
    """Print the table: each number, and how many times ours it is."""
    print(f"\nperplexity of the dense model: {dense:.3f}. MiB: peak above an interpreter that has imported torch.")
    print("seconds: without imports; ours with reading the model, the others' without; process: all, for everybody.\n")
    print(
        f"{'':<12}{'':<16}{'seconds':>9}{'/ ours':>8}{'process':>9}{'/ ours':>8}{'MiB':>8}{'/ ours':>8}"
        f"{'perplexity':>12}{'/ dense':>9}"
    )
    for case in dict.fromkeys(one.case for one in measured):
        those = [one for one in measured if one.case == case]
        mine = next((one for one in those if one.system == OURS and one.failed is None), None)
        for one in those:
            if one.failed:
                print(f"{case:<12}{one.system:<16}failed: {one.failed}")
                continue
            cells = f"{case:<12}{one.system:<16}"
            for value, own, width, digits in (
                (one.seconds, mine and mine.seconds, 9, 2),
                (one.process_seconds, mine and mine.process_seconds, 9, 2),
                ((one.above_bytes or 0) / MIB, mine and (mine.above_bytes or 0) / MIB, 8, 0),
            ):
                ratio = f"{value / own:.2f}" if value and own else "-"
                cells += f"{value:>{width}.{digits}f}{ratio:>8}"
            print(f"{cells}{one.perplexity:>12.3f}{(one.perplexity or 0) / dense:>9.4f}")


def aims(measured: Sequence[Measured]) -> list[Target]:
    """What this project wants to reach beside the others, case by case."""
    found = []
    for case in dict.fromkeys(one.case for one in measured):
        those = {one.system: one for one in measured if one.case == case and one.failed is None}
        mine = those.pop(OURS, None)
        reference = [one for one in those.values() if one.system == REFERENCE]
        others = [one for one in those.values() if one.system not in (OURS_DENSE, REFERENCE)]
        if not others:
            others = reference
        rows: list[tuple[str, float, Callable[[Measured], float | int | None], list[Measured]]] = [
            ("seconds / the fastest peer's", SECONDS_LIMIT, lambda one: one.seconds, others),
            ("process seconds / the fastest peer's", SECONDS_LIMIT, lambda one: one.process_seconds, others),
            ("process seconds / the reference's", SECONDS_LIMIT, lambda one: one.process_seconds, reference),
            ("peak memory above torch / the smallest peer's", MEMORY_LIMIT, lambda one: one.above_bytes, others),
            ("perplexity / the best peer's", PERPLEXITY_LIMIT, lambda one: one.perplexity, others),
            ("perplexity / the reference's", PERPLEXITY_LIMIT, lambda one: one.perplexity, reference),
        ]
        for what, limit, value_of, compared in rows:
            found.append(Target(f"{case}: {what}", limit, _ratio(mine, compared, value_of)))
    return found


def _ratio(mine: Measured | None, others: Sequence[Measured], value_of: Callable[[Measured], Any]) -> float | None:
    values = [value for value in map(value_of, others) if value is not None]
    own = mine and value_of(mine)
    return own / min(values) if own is not None and values else None


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
