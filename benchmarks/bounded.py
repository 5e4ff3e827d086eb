"""A model of several GB, quantized under a cap that could not hold it.

    python -m benchmarks.bounded [--layers 34] [--cap 1.0] [--save]

Makes a random-weight Llama checkpoint (hidden 2048, intermediate 5632, 94 MB a block in bfloat16), quantizes it with
`max_memory_gib`, and compares the peak above an interpreter that has imported torch with the bound: two blocks'
weights, one block's statistics (the lower triangles of H), and the cap.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import ours, results, targets
from benchmarks.material import shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.processes import RunError
from benchmarks.random_model import Shape, write
from benchmarks.systems import OURS, baseline_bytes
from benchmarks.targets import Target

HIDDEN, INTERMEDIATE = 2048, 5632
SEQUENCES, LENGTH = 2, 512
GIB = 2**30


def main() -> None:
    """Make the model, quantize it, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--cap", type=float, default=1.0, help="max_memory_gib")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/bounded.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, _ = split_text(shared_data() / "text" / "heldout-code.txt", folder)
        shape = Shape(hidden=HIDDEN, intermediate=INTERMEDIATE, layers=arguments.layers)
        write(folder / "model", shape)
        stored = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        step = {"quantize": "gptq", "with": {"num_bits": 4, "group_size": 128}}
        result = ours.compress(
            folder / "model",
            Calibration(text, SEQUENCES, LENGTH),
            step,
            folder / "spec",
            folder / "home",
            max_memory_gib=arguments.cap,
        )
    done = result["steps"][1]
    kv = HIDDEN * shape.kv_heads // shape.heads
    block = 2 * (2 * HIDDEN**2 + 2 * HIDDEN * kv + 3 * HIDDEN * INTERMEDIATE)
    statistics = 2 * (3 * HIDDEN**2 + INTERMEDIATE**2)
    bound = 2 * block + statistics + int(arguments.cap * GIB)
    above = done["peak_memory_bytes"] - baseline_bytes(OURS)
    print(f"model {stored / GIB:.2f} GiB on disk, cap {arguments.cap} GiB, {done['seconds']:.0f} s")
    print(f"peak above torch {above / GIB:.3f} GiB; bound {bound / GIB:.3f}: two blocks {2 * block / GIB:.3f}, one")
    print(f"block's statistics {statistics / GIB:.3f}, and the cap. Predicted {done['predicted']}")
    aimed = [
        Target("peak above torch / the bound", 1.0, above / bound),
        Target("cap / the model's size on disk", 0.5, arguments.cap * GIB / stored),
    ]
    targets.show(aimed)
    if arguments.save:
        results.save(
            "bounded",
            {
                **results.circumstances(),
                "model_bytes": stored,
                "layers": arguments.layers,
                "cap_gib": arguments.cap,
                "peak_above_torch_bytes": above,
                "bound_bytes": bound,
                "step": {key: done[key] for key in ("seconds", "peak_memory_bytes", "disk_bytes", "predicted")},
                "targets": [target.record() for target in aimed],
            },
        )


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
