"""Eight candidates of one model, beside one conventional run of one of them.

    python -m benchmarks.sweep [--inputs propagated] [--model DIR] [--quick] [--save]

The candidates share one home. Every block is calibrated on the dense model's inputs, whose
statistics are the same for all candidates: the first one measures them, the others find them in the home. Each
candidate is one `orchestrator run`, a process of its own. Without `--model`, a random model is made.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import memory, ours, results, targets
from benchmarks.cases import CASES
from benchmarks.material import shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.processes import RunError
from benchmarks.systems import PEERS, Measured, Work, make_windows, measure
from benchmarks.targets import Target

CASE = "W4g128"  # the first candidate, and what the peers run
LAYERS, SEQUENCES, LENGTH = 8, 64, 512
FURTHER_LIMIT = 0.15  # seconds of each further candidate / of the first
ALL_LIMIT = 0.75  # seconds of all eight / of one peer's single run


def gptq(num_bits: int, group_size: int) -> dict[str, Any]:
    """Return a quantize step."""
    return {"quantize": "gptq", "with": {"num_bits": num_bits, "group_size": group_size}}


CANDIDATES: dict[str, dict[str, Any]] = {
    CASE: ours.step_of(CASES[CASE]),
    "W2g64": gptq(2, 64),
    "W3g64": gptq(3, 64),
    "W3g128": gptq(3, 128),
    "W4g64": gptq(4, 64),
    "W8g128": gptq(8, 128),
    "Wanda 50 %": ours.step_of(CASES["Wanda 50 %"]),
    "Wanda 2:4": ours.step_of(CASES["Wanda 2:4"]),
}


def main() -> None:
    """Run the candidates and the peers, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", choices=("dense", "propagated"), default="dense")
    parser.add_argument("--model", type=Path, help=f"default: a random one of {LAYERS} layers, --quick: reference-7m")
    parser.add_argument("--text", type=Path, help="default heldout-code.txt, of which the first half is used")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sweep.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, _ = split_text(arguments.text or shared_data() / "text" / "heldout-code.txt", folder)
        model = arguments.model
        if model is None and arguments.quick:
            model = shared_data() / "models" / "reference-7m"
        elif model is None:
            model = folder / "random"
            memory.make_model(model, LAYERS)
        sequences, length = (8, 256) if arguments.quick else (SEQUENCES, LENGTH)
        calibration = Calibration(text, sequences, length)
        ran = candidates(model.resolve(), calibration, folder, arguments.inputs)
        windows = folder / "windows.safetensors"
        make_windows(model, text, windows, sequences, length)
        work = Work(model.resolve(), calibration, windows)
        peers = [measure(peer, CASE, work, folder / "peer") for peer in arguments.peers]
    show(ran, peers)
    aimed = aims(ran, peers)
    targets.show(aimed)
    if arguments.save:
        results.save(
            "sweep",
            {
                **results.circumstances(),
                "quick": arguments.quick,
                "inputs": arguments.inputs,
                "model": model.name,
                "calibration": {"sequences": sequences, "length_tokens": length},
                "candidates": ran,
                "peers": [peer.record() for peer in peers],
                "targets": [target.record() for target in aimed],
            },
        )


def candidates(model: Path, calibration: Calibration, folder: Path, inputs: str) -> dict[str, dict[str, float]]:
    """Run them one after the other in one home; return the seconds of each one's step and of its process."""
    ran = {}
    for name, plain in CANDIDATES.items():
        step = {**plain, "inputs": inputs}
        result = ours.compress(model, calibration, step, folder / "spec", folder / "home")
        ran[name] = {"seconds": result["steps"][1]["seconds"], "process_seconds": result["process_seconds"]}
        print(f"{name}: {ran[name]['seconds']:.1f} s", flush=True)
    return ran


def show(ran: dict[str, dict[str, float]], peers: Sequence[Measured]) -> None:
    """Print the candidates, their sum, and the peers' single runs."""
    first = ran[CASE]
    total = {key: sum(one[key] for one in ran.values()) for key in first}
    print(f"\n{'':<28}{'seconds':>9}{'/ first':>9}{'process':>9}{'/ first':>9}")
    for name, one in {**ran, "all": total}.items():
        cells = "".join(f"{one[key]:>9.2f}{one[key] / first[key]:>9.2f}" for key in ("seconds", "process_seconds"))
        print(f"{name:<28}{cells}")
    for peer in peers:
        label = f"{peer.system}, {CASE} once"
        if peer.failed or not peer.seconds or not peer.process_seconds:
            print(f"{label:<28}failed: {peer.failed}")
            continue
        cells = "".join(
            f"{seconds:>9.2f}{seconds / first[key]:>9.2f}"
            for key, seconds in (("seconds", peer.seconds), ("process_seconds", peer.process_seconds))
        )
        print(f"{label:<28}{cells}")


def aims(ran: dict[str, dict[str, float]], peers: Sequence[Measured]) -> list[Target]:
    """Each further candidate nearly free; all together less than one run of a peer."""
    first = ran[CASE]["seconds"]
    total = sum(one["seconds"] for one in ran.values())
    further = [
        Target(f"seconds of {name} / of {CASE}, the first", FURTHER_LIMIT, one["seconds"] / first)
        for name, one in ran.items()
        if name != CASE
    ]
    return further + [
        Target(
            f"seconds of all {len(ran)} / of {CASE} once by {peer.system}",
            ALL_LIMIT,
            total / peer.seconds if peer.seconds and not peer.failed else None,
        )
        for peer in peers
    ]


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
