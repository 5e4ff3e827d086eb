"""Who is compared: this project, the authors' form of the methods, and the peers. One compression in one process each.

A peer that cannot be installed or does not run is recorded with the reason, never left out.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ours
from benchmarks.cases import CASES
from benchmarks.material import REPOSITORY
from benchmarks.ours import Calibration
from benchmarks.peers.environments import PeerError, python_of
from benchmarks.processes import RunError, environment, peer_environment, run

OURS = "ours"
OURS_DENSE = "ours, dense"  # calibrated on the dense model's inputs, so that further candidates need no tokens
REFERENCE = "reference"
# Name, module of the runner, environment; None is this project's.
PEERS = {
    REFERENCE: ("benchmarks.peers.reference", None),
    "llm-compressor": ("benchmarks.peers.llm_compressor", "llmcompressor"),
    "GPTQModel": ("benchmarks.peers.gptq_model", "gptqmodel"),
}
SYSTEMS = (OURS, OURS_DENSE, *PEERS)


def supports(system: str, case: str) -> bool:
    """Whether the system has the method at all. GPTQModel prunes nothing; the reference is that of two papers."""
    method = CASES[case].method
    return {"GPTQModel": method == "gptq", REFERENCE: method in ("gptq", "wanda")}.get(system, True)


@dataclass(frozen=True)
class Work:
    """What to compress and on what. windows: the calibration's token windows, as a file."""

    model: Path
    calibration: Calibration
    windows: Path
    dtype: str = "float32"  # what peers load the model in


@dataclass
class Measured:
    """One compression. `checkpoint` loads in stock Transformers; `failed` says why there is none.

    seconds: of the compression proper, without imports: of ours the step from reading the model to the verified and
        stored artifact, of the others from the loaded model to the saved one.
    """

    system: str
    case: str
    seconds: float | None = None
    process_seconds: float | None = None
    peak_bytes: int | None = None
    above_bytes: int | None = None
    perplexity: float | None = None
    failed: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    checkpoint: Path | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {key: value for key, value in vars(self).items() if key != "checkpoint" and value not in (None, {})}


def interpreter(system: str) -> str:
    """Return the Python that runs the system. Raises `RunError` if it cannot be installed."""
    name = None if system in (OURS, OURS_DENSE) else PEERS[system][1]
    if name is None:
        return sys.executable
    try:
        return str(python_of(name))
    except PeerError as error:
        raise RunError(f"not installed: {error}") from None


@functools.cache
def baseline_bytes(system: str) -> int:
    """Peak of an interpreter of that environment that has imported torch and does nothing. Raises `RunError`."""
    variables = environment() if interpreter(system) == sys.executable else peer_environment()
    return int(run([interpreter(system), "-m", "benchmarks.peak"], variables).stdout)


def measure(system: str, case: str, work: Work, folder: Path) -> Measured:
    """Compress once. Its files are under `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = Measured(system, case)
    try:
        baseline = baseline_bytes(system)
        if system in (OURS, OURS_DENSE):
            _ours(measured, work, folder)
        else:
            _peer(measured, work, folder)
        assert measured.peak_bytes is not None
        measured.above_bytes = measured.peak_bytes - baseline
    except RunError as error:
        measured.failed = str(error)
    return measured


def _ours(measured: Measured, work: Work, folder: Path) -> None:
    inputs = "dense" if measured.system == OURS_DENSE else "propagated"
    step = ours.step_of(CASES[measured.case], inputs)
    result = ours.compress(work.model, work.calibration, step, folder, folder / "home")
    ours.check_windows(result, work.windows)
    measured.seconds = result["steps"][1]["seconds"] - result["steps"][1]["import_seconds"]
    measured.process_seconds = result["process_seconds"]
    measured.peak_bytes = ours.peak_of(result)
    measured.checkpoint = Path(result["steps"][1]["artifact"]["path"])


def _peer(measured: Measured, work: Work, folder: Path) -> None:
    module, peer = PEERS[measured.system]
    variables = environment() if peer is None else peer_environment()
    out, report = folder / "out", folder / "report.json"
    arguments = [work.model, work.windows, measured.case, out, report, "--dtype", work.dtype]
    # Some leave logs in the working folder.
    where = REPOSITORY if peer is None else folder
    finished = run([interpreter(measured.system), "-m", module, *arguments], variables, where)
    reported = json.loads(report.read_text(encoding="utf-8"))
    measured.seconds = reported["seconds"]
    measured.process_seconds = finished.seconds
    measured.peak_bytes = reported["peak_bytes"]
    measured.versions = reported["versions"]
    measured.checkpoint = out


def evaluate(measured: Measured, dense_model: Path, windows: Path) -> None:
    """Fill in the perplexity."""
    if measured.checkpoint is None:
        return
    try:
        checkpoint = measured.checkpoint
        if measured.system == "GPTQModel":  # packed in a format of its own
            checkpoint = measured.checkpoint.with_name("dense")
            module = "benchmarks.peers.gptq_model_dense"
            run(
                [interpreter("GPTQModel"), "-m", module, measured.checkpoint, dense_model, checkpoint],
                peer_environment(),
                checkpoint.parent,
            )
        if not CASES[measured.case].symmetric:
            _unpack_on_loading(checkpoint)
        measured.perplexity = perplexity(checkpoint, windows)
    except RunError as error:
        measured.failed = f"evaluation: {error}"


def _unpack_on_loading(checkpoint: Path) -> None:
    """Transformers 5 loads packed zero points only where it is told to decompress them; ours say so by themselves."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(config), encoding="utf-8")


def perplexity(checkpoint: Path, windows: Path) -> float:
    """Of any checkpoint, by the one evaluator. Raises `RunError`."""
    finished = run([sys.executable, "-m", "benchmarks.perplexity", checkpoint, windows], environment())
    return float(json.loads(finished.stdout)["perplexity"])


def make_windows(model: Path, text: Path, out: Path, sequences: int, length: int, *, in_order: bool = False) -> None:
    """Write token windows for the peers, or with `in_order` for the evaluator. Raises `RunError`."""
    arguments = ["--sequences", str(sequences), "--length", str(length), *(["--in-order"] if in_order else [])]
    run([sys.executable, "-m", "benchmarks.windows", model, text, out, *arguments], environment())
