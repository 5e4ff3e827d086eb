"""Distillation beside trl's GKD trainer: seconds per update, peak memory, held-out KL; in one run on one machine.

    python -m benchmarks.distillation [--updates N] [--repeats N] [--model DIR] [--removed N] [--save]

Both train the same student with the same teacher on the same windows in the same order, by the same AdamW at the same
rates, each in a fresh process with the same threads; systems take turns. The small student is the dense model without
some of its layers, so that neither side has zeros to keep; it is trained on the first half of the text and evaluated on
the second. The large vocabulary has random weights and random tokens: only time and memory are of interest there.

Ours is measured with the teacher's cache filled before, with the cache made within the run, and with the teacher in
memory. seconds: from the loaded models to the trained weights, ours with its looks at the held-out windows, by which it
chooses the parameters that it returns, and its states on disk; trl does neither. updates alone: without these.

Whoever keeps the teacher in memory also runs it forwards. Of a student that costs S, three passes of it and one of a
teacher that costs T: a cache saves no more than T of 3 S + T, half of all if the teacher is three times as large.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ours, results, targets
from benchmarks.material import REPOSITORY, shared_data, split_text
from benchmarks.ours import Calibration
from benchmarks.peak import peak_bytes
from benchmarks.peers.environments import PeerError, python_of
from benchmarks.processes import THREADS, RunError, environment, run
from benchmarks.systems import make_windows
from benchmarks.targets import Target

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TRL = "trl GKD"
CACHED = "ours, cached"
FILLING = "ours, filling the cache"
IN_MEMORY = "ours, teacher in memory"
SYSTEMS = (TRL, CACHED, FILLING, IN_MEMORY)
CASES = ("small", "large")
COMPUTE = ("float32", "bfloat16")

# What both are given.
BATCH, LENGTH, WINDOWS, EVALUATED = 4, 256, 128, 64
OPTIMIZER = {
    "batch": BATCH,
    "learning_rate": 5e-4,
    "warmup_fraction": 0.05,
    "betas": (0.9, 0.95),  # ours always
    "clip": 1.0,
}
# The shape of SmolLM2-135M with six of its layers, and what it is given.
LARGE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LARGE_UPDATES, LARGE_REPEATS = 8, 1

SECONDS_LIMIT = 0.5
MEMORY_LIMIT = 0.7
KL_LIMIT = 1.0
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """What is trained on what. windows: all, of which ours holds the first ones out. taught: the rows of all updates.

    tokenizer: a folder; trl insists on one. held_out: windows to evaluate on, of other text; None if nothing is to be
    evaluated. examine_every: updates between two of our looks at the windows that are held out.
    """

    name: str
    student: Path
    teacher: Path
    tokenizer: Path
    windows: Path
    taught: Path
    held_out: Path | None
    updates: int
    repeats: int
    examine_every: int | None


@dataclass
class Measured:
    """One training. Seconds are those of one update; `failed` says why there are none.

    cpu_seconds: as `seconds`, of all threads; says more than these where the machine is shared.
    """

    case: str
    compute: str
    system: str
    seconds: float | None = None
    update_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    above_bytes: int | None = None
    kl: float | None = None
    perplexity: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    failed: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {key: value for key, value in vars(self).items() if value not in (None, {})}


def main() -> None:
    """Measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=112, help="of the small model; the large takes 8 at most")
    parser.add_argument("--repeats", type=int, default=3, help="of the small model; medians are shown")
    parser.add_argument("--model", type=Path, help="a dense Llama-like checkpoint; default reference-7m")
    parser.add_argument("--text", type=Path, help="halved to train and to evaluate; default heldout-code.txt")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--compute", nargs="+", choices=COMPUTE, default=list(COMPUTE))
    parser.add_argument("--top-k", type=int, default=64, help="probabilities that the cache keeps of each position")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--removed", type=int, default=2, help="layers that the small student lacks; the more, the smaller"
    )
    parser.add_argument("--threads", type=int, default=min(THREADS, os.cpu_count() or 1), help="of each process")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/distillation.json")
    arguments = parser.parse_args()
    text = arguments.text or shared_data() / "text" / "heldout-code.txt"
    model = (arguments.model or shared_data() / "models" / "reference-7m").resolve()
    measured: list[Measured] = []
    closeness: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in arguments.cases:
            if case == "small":
                setting = small(model, text, folder / case, arguments)
                judge = Judge(setting)
                closeness = {"dense": judge.of(setting.teacher), "student": judge.of(setting.student)}
                for what, found in closeness.items():
                    print(f"{what}: perplexity {found['perplexity']:.3f}, KL {found['kl']:.5f}", flush=True)
            else:
                setting, judge = large(folder / case, arguments.updates), None
            for compute in arguments.compute:
                measured += measure_all(setting, compute, judge, folder, arguments)
    show(measured)
    aimed = aims(measured)
    targets.show(aimed)
    if arguments.save:
        about = results.circumstances()
        about["machine"]["threads"] = arguments.threads
        results.save(
            "distillation",
            {
                **about,
                "model": model.name,
                "text": text.name,
                "layers_removed": arguments.removed,
                "windows": {"trained": WINDOWS, "evaluated": EVALUATED, "length_tokens": LENGTH},
                "optimizer": {**OPTIMIZER, "updates": arguments.updates},
                "teacher_top_k": arguments.top_k,
                "repeats": arguments.repeats,
                "large": {**LARGE, "updates": min(LARGE_UPDATES, arguments.updates), "repeats": LARGE_REPEATS},
                "untrained": closeness,
                "runs": [one.record() for one in measured],
                "targets": [target.record() for target in aimed],
            },
        )


def small(model: Path, text: Path, folder: Path, arguments: argparse.Namespace) -> Setting:
    """The dense model and what is left of it without some layers. Raises `RunError`."""
    folder.mkdir()
    trained_on, evaluated_on = split_text(text, folder)
    windows, held_out = folder / "windows.safetensors", folder / "held-out.safetensors"
    make_windows(model, trained_on, windows, WINDOWS, LENGTH)
    make_windows(model, evaluated_on, held_out, EVALUATED, LENGTH, in_order=True)
    step = {"prune": "depth", "with": {"layers": arguments.removed, "criterion": "evenly"}}
    done = ours.compress(model, Calibration(trained_on, 8, LENGTH), step, folder / "spec", folder / "home")
    student = Path(done["steps"][1]["artifact"]["path"])
    taught = write_taught(windows, folder / "taught.safetensors", arguments.updates)
    rounds = arguments.updates, arguments.repeats
    return Setting("small", student, model, model, windows, taught, held_out, *rounds, examine_every=None)


def large(folder: Path, updates: int) -> Setting:
    """Random weights and random tokens. Raises `RunError`.

    So few updates would be examined after each one; a tenth of the updates of a real run are.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    updates = min(LARGE_UPDATES, updates)
    models = []
    for seed, name in enumerate(("teacher", "student")):
        models.append(folder / name)
        run([sys.executable, "-m", "benchmarks.distillation", "random-model", models[-1], str(seed)], environment())
    count = -(-8 * BATCH * updates // 7)  # an eighth is held out
    generator = torch.Generator().manual_seed(0)
    windows = folder / "windows.safetensors"
    save_file({"tokens_NT": torch.randint(LARGE["vocab_size"], (count, LENGTH), generator=generator)}, windows)
    taught = write_taught(windows, folder / "taught.safetensors", updates)
    tokenizer = shared_data() / "models" / "reference-7m"  # all its ids are valid here too
    return Setting("large", models[1], models[0], tokenizer, windows, taught, None, updates, LARGE_REPEATS, updates)


def write_taught(windows: Path, out: Path, updates: int) -> Path:
    """Write the windows in the order in which our updates read them, those of all updates."""
    import torch
    from safetensors.torch import load_file, save_file

    from orchestrator_distillation.lesson import Order

    tokens_NT = load_file(windows)["tokens_NT"]
    tokens_NT = tokens_NT[min(16, max(1, len(tokens_NT) // 8)) :]  # what ours holds out; `learn` checks this
    order = Order(len(tokens_NT), BATCH, seed=0)
    save_file({"tokens_NT": torch.cat([tokens_NT[order.next()] for _ in range(updates)])}, out)
    return out


class Judge:
    """Evaluates students by stock Transformers in float32."""

    def __init__(self, setting: Setting) -> None:
        from safetensors.torch import load_file

        from benchmarks.closeness import Evaluator

        assert setting.held_out is not None
        self._evaluate = Evaluator(self._load(setting.teacher), load_file(setting.held_out)["tokens_NT"])

    def of(self, folder: Path) -> dict[str, float]:
        """Return `kl` and `perplexity`."""
        return self._evaluate(self._load(folder)).record()

    @staticmethod
    def _load(folder: Path) -> Any:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure_all(
    setting: Setting, compute: str, judge: Judge | None, folder: Path, arguments: argparse.Namespace
) -> list[Measured]:
    """Everybody in turns; medians."""
    found: dict[str, list[Measured]] = {system: [] for system in arguments.systems}
    for repeat in range(setting.repeats):
        for system in found:
            one = measure(setting, compute, system, folder / "run", arguments.top_k, arguments.threads)
            if repeat == 0 and judge is not None and one.failed is None:  # the repeats give the same weights
                vars(one).update(judge.of(folder / "run" / "out"))
            found[system].append(one)
            print(f"{setting.name}, {compute}, {system}: {one.failed or f'{one.seconds:.3f} s/update'}", flush=True)
    return [median(ones) for ones in found.values()]


def measure(setting: Setting, compute: str, system: str, folder: Path, top_k: int, threads: int) -> Measured:
    """Train once. The student is left in `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = Measured(setting.name, compute, system)
    job = {
        **OPTIMIZER,
        "student": str(setting.student),
        "teacher": str(setting.teacher),
        "tokenizer": str(shared_data() / "models" / "reference-7m")
        if setting.held_out is None
        else str(setting.teacher),
        "windows": str(setting.windows),
        "taught": str(setting.taught),
        "folder": str(folder),
        "out": str(folder / "out"),
        "report": str(folder / "report.json"),
        "updates": setting.updates,
        "examine_every": setting.examine_every,
        "compute": compute,
        "teacher_top_k": None if system == IN_MEMORY else top_k,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    try:
        python = interpreter(system)
        baseline = baseline_bytes(python, threads)
        variables = threaded(threads)
        if system == TRL:
            # It may leave logs in the working folder.
            run([python, "-m", "benchmarks.peers.trl_gkd", path], variables, folder)
        else:
            if system == CACHED:
                run([python, "-m", "benchmarks.distillation", "fill", path], variables)
            run([python, "-m", "benchmarks.distillation", "learn", path], variables)
        reported = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        measured.seconds = reported.pop("seconds") / setting.updates
        measured.update_seconds = reported.pop("update_seconds") / setting.updates
        measured.cpu_seconds = reported.pop("cpu_seconds") / setting.updates
        measured.above_bytes = reported["peak_bytes"] - baseline
        vars(measured).update(reported)
    except RunError as error:
        measured.failed = str(error)
    return measured


def interpreter(system: str) -> str:
    """Return the Python that runs the system. Raises `RunError` if it cannot be installed."""
    if system != TRL:
        return sys.executable
    try:
        return str(python_of("trl"))
    except PeerError as error:
        raise RunError(f"not installed: {error}") from None


def threaded(threads: int) -> dict[str, str]:
    """Variables of everybody's process; of ours, only the runners are on a peer's path."""
    return environment(PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))


@functools.cache
def baseline_bytes(python: str, threads: int) -> int:
    """Peak of an interpreter that has imported torch and does nothing. Raises `RunError`."""
    return int(run([python, "-m", "benchmarks.peak"], threaded(threads)).stdout)


def median(ones: Sequence[Measured]) -> Measured:
    """The first with the medians of all; any failure counts."""
    first = next((one for one in ones if one.failed), ones[0])
    if first.failed is None:
        for name in ("seconds", "update_seconds", "cpu_seconds", "peak_bytes", "above_bytes"):
            setattr(first, name, statistics.median(getattr(one, name) for one in ones))
    return first


def show(measured: Sequence[Measured]) -> None:
    """Print the table: each number, and what share of trl's it is."""
    print(
        "\ns/update: all of the training; alone: the updates only; CPU: all, of all threads. MiB: peak of the process;"
    )
    print("above: without what importing torch takes. KL and perplexity: held-out windows, student in float32.\n")
    print(
        f"{'':<42}{'s/update':>9}{'/ trl':>7}{'alone':>9}{'/ trl':>7}{'CPU':>9}{'/ trl':>7}{'MiB':>7}{'/ trl':>7}"
        f"{'above':>7}{'/ trl':>7}{'KL':>10}{'/ trl':>7}{'perplexity':>12}"
    )
    for one in measured:
        label = f"{one.case + ', ' + one.compute:<16}{one.system:<26}"
        if one.failed:
            print(f"{label}failed: {one.failed}")
            continue
        theirs = peer_of(one, measured)
        cells = ""
        for name, unit, width, digits in (
            ("seconds", 1, 9, 3),
            ("update_seconds", 1, 9, 3),
            ("cpu_seconds", 1, 9, 3),
            ("peak_bytes", MIB, 7, 0),
            ("above_bytes", MIB, 7, 0),
            ("kl", 1, 10, 5),
        ):
            value, ratio = getattr(one, name), ratio_of(one, theirs, name)
            cells += f"{'-':>{width}}" if value is None else f"{value / unit:>{width}.{digits}f}"
            cells += f"{'-':>7}" if ratio is None else f"{ratio:>7.2f}"
        print(label + cells + (f"{'-':>12}" if one.perplexity is None else f"{one.perplexity:>12.3f}"))


def peer_of(one: Measured, measured: Sequence[Measured]) -> Measured | None:
    """Return trl's of the same case, if it did not fail."""
    same = [other for other in measured if (other.case, other.compute) == (one.case, one.compute)]
    return next((other for other in same if other.system == TRL and other.failed is None), None)


def ratio_of(one: Measured, theirs: Measured | None, name: str) -> float | None:
    """Divide one number of both."""
    own, other = getattr(one, name), theirs and getattr(theirs, name)
    return own / other if own is not None and other else None


def aims(measured: Sequence[Measured]) -> list[Target]:
    """What this project wants to reach with a cached teacher."""
    found = []
    for one in measured:
        if one.system != CACHED:
            continue
        rows = [
            ("seconds per update, updates alone", SECONDS_LIMIT, "update_seconds"),
            ("peak memory", MEMORY_LIMIT, "peak_bytes"),
            ("peak memory above torch", MEMORY_LIMIT, "above_bytes"),
        ]
        if one.case == "small":
            rows.insert(0, ("seconds per update", SECONDS_LIMIT, "seconds"))
            rows.append(("held-out KL", KL_LIMIT, "kl"))
        theirs = peer_of(one, measured)
        for what, limit, name in rows:
            found.append(Target(f"{one.case}, {one.compute}: {what} / trl's", limit, ratio_of(one, theirs, name)))
    return found


class Watch:
    """Looks on while ours trains: seconds of the updates, seconds of loading a teacher, the tokens that are taught."""

    def __init__(self) -> None:
        self.update_seconds = self.load_seconds = self.load_cpu_seconds = 0.0
        self.taught: list[Any] = []

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Wrap what is looked at."""
        from orchestrator_distillation import loop, outputs, teachers

        update, load, backward = loop.Trainer._update, teachers.Ensemble.load, outputs.Scorer.backward

        def timed_update(*given: Any) -> float:
            start = time.perf_counter()
            loss = update(*given)
            self.update_seconds += time.perf_counter() - start
            return loss

        def timed_load(*given: Any, **named: Any) -> Any:
            start, cpu_start = time.perf_counter(), time.process_time()
            loaded = load(*given, **named)
            self.load_seconds += time.perf_counter() - start
            self.load_cpu_seconds += time.process_time() - cpu_start
            return loaded

        def heard(scorer: Any, tokens_BT: Any, *given: Any) -> float:
            self.taught.append(tokens_BT)
            return backward(scorer, tokens_BT, *given)

        loop.Trainer._update = timed_update  # type: ignore[method-assign]
        teachers.Ensemble.load = timed_load  # type: ignore[method-assign, assignment]
        outputs.Scorer.backward = heard  # type: ignore[method-assign]
        try:
            yield
        finally:
            loop.Trainer._update = update  # type: ignore[method-assign]
            teachers.Ensemble.load = load  # type: ignore[method-assign]
            outputs.Scorer.backward = backward  # type: ignore[method-assign]


def method_and_context(job: dict[str, Any]) -> tuple[Any, Any]:
    """Return ours as a run of the orchestrator would call it, with folders for states and for the teacher's cache."""
    from safetensors.torch import load_file

    from orchestrator.api import CalibrationSet, Checkpoint, Context
    from orchestrator_distillation.presets import Logits

    folders = {name: Path(job["folder"]) / name for name in ("scratch", "state", "cache")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    method = Logits(
        updates=job["updates"],
        batch_sequences=job["batch"],
        length_tokens=LENGTH,
        learning_rate=job["learning_rate"],
        warmup_fraction=job["warmup_fraction"],
        clip_norm=job["clip"],
        weight_decay=0.0,
        examine_every=job["examine_every"],
        compute=job["compute"],
        teacher_top_k=job["teacher_top_k"],
    )
    context = Context(
        seed=0,
        dense=Checkpoint(Path(job["teacher"])),
        calibration=CalibrationSet(load_file(job["windows"])["tokens_NT"], {}),
        checkpoint=Checkpoint(Path(job["student"])),
        **folders,
    )
    return method, context


def fill(path: str) -> None:
    """Fill the teacher's cache."""
    method, context = method_and_context(json.loads(Path(path).read_text(encoding="utf-8")))
    method.prepare(context)


def learn(path: str) -> None:
    """Train by ours, report, and save the student in float32."""
    import torch
    from safetensors.torch import load_file

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    method, context = method_and_context(job)
    watch = Watch()
    with watch.looking():
        start, cpu_start = time.perf_counter(), time.process_time()
        method.prepare(context)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        model = context.checkpoint.load(torch.float32)
        start, cpu_start = time.perf_counter(), time.process_time()
        result = method.apply(model, context)
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
    report = {
        "seconds": seconds - watch.load_seconds,
        "update_seconds": watch.update_seconds,
        "cpu_seconds": cpu_seconds - watch.load_cpu_seconds,
        "peak_bytes": peak_bytes(),
        "first_loss": result.metrics["first_loss"],
        "last_loss": result.metrics["last_loss"],
    }
    if not torch.equal(torch.cat(watch.taught), load_file(job["taught"])["tokens_NT"]):
        raise SystemExit("Error: ours was taught other windows than trl")
    result.model.save_pretrained(job["out"])
    Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")


def random_model(folder: str, seed: str) -> None:
    """Write random weights of the large shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(int(seed))
    LlamaForCausalLM(LlamaConfig(**LARGE)).to(torch.bfloat16).save_pretrained(folder)


# What this module is called with in the processes that it starts.
RUNNERS = {"fill": fill, "learn": learn, "random-model": random_model}


if __name__ == "__main__":
    try:
        if sys.argv[1:2] and sys.argv[1] in RUNNERS:
            RUNNERS[sys.argv[1]](*sys.argv[2:])
        else:
            main()
    except RunError as error:
        raise SystemExit(f"failed: {error}") from None
